"""Thin command line: the same as ``turboquant-hf baselines``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["baselines", *sys.argv[1:]]))
