"""Thin command line: the same as ``turboquant-hf benchmark``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["benchmark", *sys.argv[1:]]))
