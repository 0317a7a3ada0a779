#!/usr/bin/env bash
# Installs what is missing, then runs the tests. Arguments go to pytest:
#   scripts/test.sh
#   scripts/test.sh tests/unit -x
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh --dev
exec .venv/bin/python -m pytest "$@"
