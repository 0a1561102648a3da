"""Thin command line: the same as ``turboquant-hf allocate``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["allocate", *sys.argv[1:]]))
