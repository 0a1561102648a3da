"""Thin command line: the same as ``turboquant-hf report``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["report", *sys.argv[1:]]))
