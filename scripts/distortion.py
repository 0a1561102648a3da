"""Thin command line: the same as ``turboquant-hf distortion``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["distortion", *sys.argv[1:]]))
