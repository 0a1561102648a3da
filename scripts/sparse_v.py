"""Thin command line: the same as ``turboquant-hf sparse-v``."""

import sys

from turboquant_hf import cli

sys.exit(cli.main(["sparse-v", *sys.argv[1:]]))
