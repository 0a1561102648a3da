#!/usr/bin/env bash
# What leans on transformers' internals, once more on the lowest supported version. Its environment, .venv-lowest (or
# $VENV-lowest), holds this transformers and what it needs in other versions; the rest is read from .venv (or $VENV).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

TRANSFORMERS=5.5.0
LOWEST="$VENV-lowest"
# One layer by itself, or sums over a model's calls that other files make one by one: nothing of transformers' version.
SAME=(attention/test_chunk.py cache/test_{handles,layer,memory,numbers,refusals,repeats,state_machine,static_layer}.py
    cache/test_{storage,threads,trellis}.py generation/test_soak.py)

setup_env test
packages="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
own="$LOWEST/lib/$(basename "$(dirname "$packages")")/site-packages"
if [[ ! -d "$own/transformers-$TRANSFORMERS.dist-info" ]]; then
    echo "Installing transformers $TRANSFORMERS into $LOWEST"
    python -m venv --clear --without-pip "$LOWEST"
    echo "import site; site.addsitedir('$packages')" >"$own/base.pth"
    python -m pip --python "$LOWEST/bin/python" install --quiet --disable-pip-version-check "transformers==$TRANSFORMERS"
fi
# shellcheck disable=SC1091
source "$LOWEST/bin/activate"
run_pytest "${SAME[@]/#/--ignore=tests/}" tests/cache tests/generation tests/attention tests/evaluation/commands/test_perplexity.py "$@"
