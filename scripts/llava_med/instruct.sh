#!/usr/bin/env bash
# LLaVA-Med, stage 2: instruction tuning of the whole language model, from stage 1, with the published values.
#   MODEL=llama-med-vicuna-7b DATA=llava_med_instruct_60k_inline_mention_post.jsonl IMAGES=images \
#       bash scripts/llava_med/instruct.sh [more options of training]
# Environment: scripts/llava_med/common.sh. OUT defaults to checkpoints/llava-med-7b-instruct.
set -euo pipefail
source "$(dirname "$0")/common.sh"

check_paths
tune checkpoints/llava-med-7b-instruct 3 "$@"
