#!/usr/bin/env bash
# Runs the lessons and builds the site into docs/_build/html; a warning or a broken link between pages is an error.
# `bash scripts/docs.sh linkcheck` follows the links to other sites, too (needs a network).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env docs
cd "$ROOT"
python -m sphinx -W --keep-going -b "${1:-html}" docs "docs/_build/${1:-html}"
