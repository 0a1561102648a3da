"""Thin command line: the same as ``turboquant-hf neighbours``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["neighbours", *sys.argv[1:]]))
