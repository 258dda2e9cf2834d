#!/usr/bin/env bash
# LLaVA-Rad, stage 2: LoRA of the language model and the projector are trained on findings, with the published values.
#   data_path=chat_train.json image_folder=files PROJECTOR=mm_projector.bin bash scripts/finetune_lora.sh \
#       [OUT=./checkpoints] [EPOCHS=3] [BATCH=16] [more options of training]
# The environment that replaces the defaults is listed in scripts/llava_rad.sh.
set -euo pipefail
source "$(dirname "$0")/llava_rad.sh"

take_words 3 "$@"
epochs="${words[1]:-3}" batch="${words[2]:-16}"
check_paths
need_path PROJECTOR
need_whole BATCH "${batch}"
train lora "${words[0]:-./checkpoints}" "${epochs}" 1e-4 --version "${conv_mode:-v1}" --lora_enable True \
    --lora_alpha 128 --pretrain_mm_mlp_adapter "${PROJECTOR}" \
    --per_device_train_batch_size "${batch}" --gradient_accumulation_steps 1 "${options[@]}"
