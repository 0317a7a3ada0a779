#!/usr/bin/env bash
# Installs what is missing, then runs `atom` with the arguments given; without any, lets SmolLM2 answer a question.
#   scripts/run.sh
#   scripts/run.sh generate --model smollm2 --prompt "Name three rivers."
#   scripts/run.sh chat
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
"$root/scripts/setup.sh"
if [ $# -eq 0 ]; then
    set -- generate --model smollm2 --chat --temperature 0 --max-tokens 64 --prompt "What is the capital of France?"
fi
exec "$root/.venv/bin/atom" "$@"
