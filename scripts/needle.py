"""Thin command line: the same as ``turboquant-hf needle``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["needle", *sys.argv[1:]]))
