"""Thin command line: the same as ``turboquant-hf ablate``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["ablate", *sys.argv[1:]]))
