#!/usr/bin/env bash
# LLaVA-Med, stage 1: the projector and the embeddings of the image markers learn from captions, with the published values.
#   MODEL=llava-7b-v0 DATA=pubmed_600k.json IMAGES=pubmed_600k bash scripts/llava_med/pretrain.sh [more options of training]
# Environment: scripts/llava_med/common.sh. OUT defaults to checkpoints/llava-med-7b-pretrain.
set -euo pipefail
source "$(dirname "$0")/common.sh"

check_paths
train --tune_mm_mlp_adapter True --output_dir "${OUT:-checkpoints/llava-med-7b-pretrain}" \
    --num_train_epochs "${EPOCHS:-1}" --per_device_train_batch_size "${BATCH:-2}" \
    --gradient_accumulation_steps "${ACCUMULATION:-8}" --learning_rate 2e-3 --save_steps 2400 --save_total_limit 1 \
    --bf16 True --tf32 True --report_to none "$@"
