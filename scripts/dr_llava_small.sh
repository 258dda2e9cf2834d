#!/usr/bin/env bash
# Fine-tuning against reinforcement learning on a rule set, from small parts, with controls.
#   bash scripts/dr_llava_small.sh [--data drawn|bccd|cells] [--seed N] [--arms A,B] [--minutes M] [--out DIR] [--data-root DIR]
#     [--num-train N] [--num-test N] [--rollout-batch-size N] [--dtype bfloat16]
# drawn: smears that are drawn here (SYNTHETIC); bccd and cells read blood-bccd/ and blood-rbc12/ of --data-root. The model is
# aligned, tuned on standard-order dialogues and merged; then each arm trains for --minutes (default 10): sft (none), more_sft
# (the same dialogues again), grpo, ppo, shuffled (grpo with rewards of a group in random order). Default arms: sft, grpo,
# shuffled. Every arm is evaluated in all orders and compared with sft; OUT/results.md has the table, OUT/curves.png the
# rollouts. Rerunning continues.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
bash "${root}/scripts/setup.sh" quickstart
export PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}"
exec "${root}/.venv/bin/python" "${root}/scripts/dr_llava_small.py" "$@"
