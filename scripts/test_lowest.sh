#!/usr/bin/env bash
# What leans on transformers' internals, once more on the lowest supported version, in .venv-lowest (or $VENV).
set -euo pipefail
VENV="${VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv-lowest}"
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env test
pip_install transformers==5.5.0
run_pytest tests/cache tests/generation tests/attention tests/evaluation/commands/test_perplexity.py "$@"
