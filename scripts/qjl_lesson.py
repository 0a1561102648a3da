"""Thin command line: the same as ``turboquant-hf qjl-lesson``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["qjl-lesson", *sys.argv[1:]]))
