"""Thin command line: the same as ``turboquant-hf presets``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["presets", *sys.argv[1:]]))
