#!/usr/bin/env bash
# Installs into .venv (or $VENV), then generates with the default cache beside the uncompressed one and measures a
# small perplexity table. Arguments go to scripts/quickstart.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

echo "Step 1 of 4: install what is missing into $VENV"
echo "  The first time this downloads several hundred MB and takes minutes, by your connection; later it takes a second."
echo "  Steps 2 to 4 take about a minute on two idle cores, and longer in proportion where others use them."
setup_env
python "$ROOT/scripts/quickstart.py" "$@"
