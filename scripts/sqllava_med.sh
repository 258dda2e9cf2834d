#!/usr/bin/env bash
# Self-questioning instruction tuning of STLLaVA-Med with the published values; its paths are arguments.
#   bash scripts/sqllava_med.sh MODEL VISION_TOWER PROJECTOR ROWS.json IMAGE_FOLDER OUT [more options]
# MODEL is a language model, PROJECTOR an mm_projector.bin. For a llava checkpoint, which holds its parts, pass "" as
# VISION_TOWER and PROJECTOR. Options that follow replace those here.
# LAUNCH="deepspeed" starts with DeepSpeed's launcher; otherwise torchrun starts NPROC processes (default 1).
# ZERO=scripts/zero3.json shards weights with DeepSpeed. What both stages share is in scripts/stllava_med.sh.
set -euo pipefail
source "$(dirname "$0")/stllava_med.sh"

train_stage train_mem.py ROWS.json --version v1_sq --num_train_epochs 3 \
    --per_device_train_batch_size 8 --per_device_eval_batch_size 6 --gradient_accumulation_steps 4 --save_total_limit 2 \
    --learning_rate 2e-4 --vision_tower_lr 5e-5 --sq_r 0.5 -- "$@"
