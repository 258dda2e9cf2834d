#!/usr/bin/env bash
# Preference training (DPO) of STLLaVA-Med with the published values; its paths are arguments.
#   bash scripts/dpo_finetune.sh MODEL VISION_TOWER PROJECTOR PAIRS.json IMAGE_FOLDER OUT [more options]
# MODEL is the merged stage-1 language model, PROJECTOR its mm_projector.bin or non_lora_trainables.bin. For a llava
# checkpoint, which holds its parts, pass "" as VISION_TOWER and PROJECTOR. Options that follow replace those here.
# LAUNCH="deepspeed" starts with DeepSpeed's launcher; otherwise torchrun starts NPROC processes (default 1).
# ZERO=scripts/zero3.json shards weights with DeepSpeed. What both stages share is in scripts/stllava_med.sh.
set -euo pipefail
source "$(dirname "$0")/stllava_med.sh"

train_stage train_mem_dpo.py PAIRS.json --version v1 --num_train_epochs 1 \
    --per_device_train_batch_size 4 --per_device_eval_batch_size 12 --gradient_accumulation_steps 16 --save_total_limit 5 \
    --learning_rate 5e-6 --vision_tower_lr 2e-5 -- "$@"
