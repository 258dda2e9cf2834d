#!/usr/bin/env bash
# LLaVA-Med, stage 3: fine-tuning on the questions of SLAKE, from stage 2, with the published values.
#   MODEL=checkpoints/llava-med-7b-instruct DATA=data/slake/train.json IMAGES=data/slake/images \
#       bash scripts/llava_med/finetune_slake.sh [more options of training]
# EPOCHS=3 is the published command; the tables of the paper are of 9 and 15 epochs.
# Environment: scripts/llava_med/common.sh. OUT defaults to MODEL/eval/fine_tuned/slake.
set -euo pipefail
source "$(dirname "$0")/common.sh"

check_paths
tune "${MODEL}/eval/fine_tuned/slake" 3 "$@"
