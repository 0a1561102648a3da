#!/usr/bin/env bash
# Installs into .venv (or $VENV) and runs the tests, without any network. Arguments go to pytest (-n0: one process).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env test
run_pytest "$@"
