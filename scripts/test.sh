#!/usr/bin/env bash
# Installs into .venv (or $VENV) and runs the tests, without any network. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env test
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}" HF_HUB_OFFLINE=1
python -m pytest -q "$@"
