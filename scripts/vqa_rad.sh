#!/usr/bin/env bash
# The VQA-RAD result of docs/results.md from raw rows: alignment, three epochs of questions, scores with controls.
#   bash scripts/vqa_rad.sh DATA_ROOT OUT
# DATA_ROOT holds vqa-rad/ and cxr-notes/, each with train.json and images/ (vqa-rad also test.json).
# LM and TOWER (paths or hub names) replace the small parts from packages; IMAGE_GROUPING=off trains in random order.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
data="${1:?usage: vqa_rad.sh DATA_ROOT OUT}"
out="${2:?usage: vqa_rad.sh DATA_ROOT OUT}"
bash "${root}/scripts/setup.sh" quickstart
bin="${root}/.venv/bin"
lm="${LM:-$("${bin}/python" -c 'from llava.model.packaged import pretrained; print(pretrained.language_model())')}"
tower="${TOWER:-$("${bin}/python" -c 'from llava.model.packaged import pretrained; print(pretrained.vision_tower(168))')}"
mkdir -p "${out}"

common=(--model_name_or_path "${lm}" --vision_tower "${tower}" --version chatml --image_aspect_ratio pad
  --mm_projector_type mlp2x_gelu --feature_cache_dir "${out}/features" --bf16 auto --optim adamw_torch_fused
  --model_max_length 1024 --per_device_train_batch_size 16 --warmup_ratio 0.05 --lr_scheduler_type cosine
  --logging_steps 5 --save_strategy epoch --save_total_limit 1 --report_to none --seed 0)

"${bin}/llava" data align "${data}/vqa-rad/train.json" "${data}/cxr-notes/train.json" \
  --root "${data}" --out "${out}/align.json"
"${bin}/llava" train "${common[@]}" --data_path "${out}/align.json" --image_folder "${data}" \
  --tune_mm_mlp_adapter True --calibrate_mm_projector True --questions_per_image 4 \
  --num_train_epochs 4 --learning_rate 1e-3 --output_dir "${out}/align"
"${bin}/llava" train "${common[@]}" --data_path "${data}/vqa-rad/train.json" --image_folder "${data}/vqa-rad/images" \
  --pretrain_mm_mlp_adapter "${out}/align/mm_projector.bin" --image_grouping "${IMAGE_GROUPING:-on}" \
  --num_train_epochs 3 --learning_rate 1e-4 --mm_projector_lr 5e-4 --weight_decay 0.01 --output_dir "${out}/model"
"${bin}/llava" eval --model "${out}/model" --data "${data}/vqa-rad/test.json" \
  --train-data "${data}/vqa-rad/train.json" --image-folder "${data}/vqa-rad/images" \
  --out "${out}/eval" --max-new-tokens 24
