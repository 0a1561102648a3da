"""Thin command line: the same as ``turboquant-hf perplexity``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["perplexity", *sys.argv[1:]]))
