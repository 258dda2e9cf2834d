#!/usr/bin/env bash
# LLaVA-Rad, stage 1: the projector alone is trained on findings, with the published values.
#   data_path=chat_train.json image_folder=files bash scripts/pretrain.sh [OUT=./checkpoints] [EPOCHS=1] [BATCH=32] \
#       [ACCUMULATION=2] [more options of training]
# The run's folder in OUT then has mm_projector.bin, the PROJECTOR of scripts/finetune_lora.sh. The environment that
# replaces the defaults is listed in scripts/llava_rad.sh.
set -euo pipefail
source "$(dirname "$0")/llava_rad.sh"

take_words 4 "$@"
epochs="${words[1]:-1}" batch="${words[2]:-32}" accumulation="${words[3]:-2}"
check_paths
need_whole BATCH "${batch}"
need_whole ACCUMULATION "${accumulation}"
train pt "${words[0]:-./checkpoints}" "${epochs}" 1e-3 --version "${conv_mode:-plain}" --tune_mm_mlp_adapter True \
    --per_device_train_batch_size "${batch}" --gradient_accumulation_steps "${accumulation}" "${options[@]}"
