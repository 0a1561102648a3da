"""Thin command line: the same as ``turboquant-hf profile``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["profile", *sys.argv[1:]]))
