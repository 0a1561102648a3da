"""Thin command line: the same as ``turboquant-hf check``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["check", *sys.argv[1:]]))
