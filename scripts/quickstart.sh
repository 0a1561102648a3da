#!/usr/bin/env bash
# Installs into .venv (or $VENV), then generates with the default cache beside the uncompressed one and measures a
# small perplexity table. Arguments go to scripts/quickstart.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

echo "Installs what is missing, then generates and measures: 2 to 5 minutes on two cores"
setup_env
python "$ROOT/scripts/quickstart.py" "$@"
