#!/usr/bin/env bash
# LLaVA-Med without stage 1: instruction tuning straight from LLaVA-7b-v0, whose projector learned from general images.
#   MODEL=llava-7b-v0 DATA=llava_med_instruct_60k_inline_mention_post.jsonl IMAGES=images \
#       bash scripts/llava_med/run_training_llava_med.sh [more options of training]
# Environment: scripts/llava_med/common.sh. OUT defaults to checkpoints/llava-med-7b-from-llava.
set -euo pipefail
source "$(dirname "$0")/common.sh"

check_paths
tune checkpoints/llava-med-7b-from-llava 3 "$@"
