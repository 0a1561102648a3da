"""Thin command line: the same as ``turboquant-hf retrieval``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["retrieval", *sys.argv[1:]]))
