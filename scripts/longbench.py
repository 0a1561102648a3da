"""Thin command line: the same as ``turboquant-hf longbench``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["longbench", *sys.argv[1:]]))
