#!/usr/bin/env bash
# From a fresh clone to a small medical vision-language model you can ask; see README.md.
#   bash scripts/quickstart.sh [--data DIR] [--lm LM] [--vision_tower TOWER] [--out DIR] [--seed N]
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
bash "${root}/scripts/setup.sh" quickstart
exec "${root}/.venv/bin/llava" quickstart "$@"
