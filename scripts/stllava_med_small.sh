#!/usr/bin/env bash
# STLLaVA-Med on small parts: alignment, self-questioning, questions and pairs of the model's own, DPO, scores with controls.
#   bash scripts/stllava_med_small.sh DATA_ROOT OUT
# DATA_ROOT holds vqa-rad/ and cxr-notes/, each with train.json and images/ (vqa-rad also test.json). Every stage that is
# finished is skipped, and one that was stopped continues: run the same line again.
# LM and TOWER (paths or hub names) replace the small parts from packages; LLAVA is the command, PYTHON its interpreter.
# SIZE is the side of an image in pixels, ASKED the number of training images that the model asks about, QUESTIONS that of
# the training questions whose answers are compared with references.
# EPOCHS (alignment, instruction, preferences), BATCH, MAX_LENGTH and TESTED, the number of test questions (all by default),
# make a run shorter.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
data="${1:?usage: stllava_med_small.sh DATA_ROOT OUT}"
out="${2:?usage: stllava_med_small.sh DATA_ROOT OUT}"
if [ -z "${LLAVA:-}" ]; then
  bash "${root}/scripts/setup.sh" quickstart
  LLAVA="${root}/.venv/bin/llava" PYTHON="${root}/.venv/bin/python"
fi
read -ra llava <<<"${LLAVA}"
python="${PYTHON:-python}"
read -ra epochs <<<"${EPOCHS:-4 3 3}"
size="${SIZE:-168}" asked="${ASKED:-64}" questions="${QUESTIONS:-600}" batch="${BATCH:-16}"
lm="${LM:-$("${python}" -c 'from llava.model.packaged import pretrained; print(pretrained.language_model())')}"
tower="${TOWER:-$("${python}" -c "from llava.model.packaged import pretrained; print(pretrained.vision_tower(${size}))")}"
rad="${data}/vqa-rad"
mkdir -p "${out}"

common=(--image_aspect_ratio pad --bf16 auto --optim adamw_torch_fused --model_max_length "${MAX_LENGTH:-1024}"
  --per_device_train_batch_size "${batch}" --warmup_ratio 0.05 --lr_scheduler_type cosine --logging_steps 5
  --save_strategy epoch --save_total_limit 1 --report_to none --seed 0)
new=(--model_name_or_path "${lm}" --vision_tower "${tower}" --mm_projector_type mlp2x_gelu)

# 1. Alignment of the projector.
"${llava[@]}" data align "${rad}/train.json" "${data}/cxr-notes/train.json" --root "${data}" --out "${out}/align.json"
"${llava[@]}" train "${common[@]}" "${new[@]}" --version chatml_sq --data_path "${out}/align.json" \
  --image_folder "${data}" --tune_mm_mlp_adapter True --calibrate_mm_projector True --questions_per_image 4 \
  --feature_cache_dir "${out}/features" --num_train_epochs "${epochs[0]}" --learning_rate 1e-3 --output_dir "${out}/align"

# 2. Instruction tuning on dialogues, half of whose later questions the model learns to ask.
"${llava[@]}" data dialogues "${rad}/train.json" --turns 5 --seed 0 --out "${out}/dialogues.json"
"${llava[@]}" train "${common[@]}" "${new[@]}" --version chatml_sq --sq_r 0.5 --data_path "${out}/dialogues.json" \
  --image_folder "${rad}/images" --pretrain_mm_mlp_adapter "${out}/align/mm_projector.bin" \
  --feature_cache_dir "${out}/features" --num_train_epochs "${epochs[1]}" --learning_rate 1e-4 --mm_projector_lr 5e-4 \
  --weight_decay 0.01 --output_dir "${out}/sft"

# 3. Questions of the model about training images, and its own answers to them and to training questions.
"${python}" - "${rad}/train.json" "${out}" "${asked}" "${questions}" <<'PYTHON'
import json, random, sys
rows, out, draw = json.load(open(sys.argv[1])), sys.argv[2], random.Random(0)
names = sorted({row["image"] for row in rows})
chosen = set(draw.sample(names, min(int(sys.argv[3]), len(names))))
kept = {row["image"]: row for row in rows if row["image"] in chosen}
json.dump([kept[name] for name in sorted(kept)], open(f"{out}/asked-images.json", "w"))
json.dump(draw.sample(rows, min(int(sys.argv[4]), len(rows))), open(f"{out}/reference-questions.json", "w"))
PYTHON
short=(--max-new-tokens 48)
"${llava[@]}" ask --model "${out}/sft" --rows "${out}/asked-images.json" --image-folder "${rad}/images" \
  --out "${out}/questions.jsonl" --max-description-tokens 96 "${short[@]}"
"${llava[@]}" preferences answer "${out}/questions.jsonl" --model "${out}/sft" --image-folder "${rad}/images" \
  --out "${out}/answers-asked.jsonl" "${short[@]}"
"${llava[@]}" preferences answer "${out}/reference-questions.json" --model "${out}/sft" --image-folder "${rad}/images" \
  --out "${out}/answers-reference.jsonl" --n 4 --temperature 1.0 --max-new-tokens 24

# 4. Pairs: by what the image adds to an answer, and by the references of the training questions.
"${llava[@]}" preferences judge "${out}/answers-asked.jsonl" --by image_gain --model "${out}/sft" \
  --image-folder "${rad}/images" --out "${out}/judged-asked.jsonl"
"${llava[@]}" preferences judge "${out}/answers-reference.jsonl" --by reference --out "${out}/judged-reference.jsonl"
# The judge without references, on questions that have some: how often it agrees with them.
"${llava[@]}" preferences judge "${out}/answers-reference.jsonl" --by image_gain --model "${out}/sft" \
  --image-folder "${rad}/images" --out "${out}/judged-reference-by-image.jsonl" \
  --report "${out}/agreement-image-gain.json"
pairs=()
for kind in asked reference; do
  # Without a preferred answer there are no pairs, which is said, and no model of this kind.
  rm -f "${out}/pairs-${kind}.json"
  "${llava[@]}" preferences pairs "${out}/judged-${kind}.jsonl" --out "${out}/pairs-${kind}.json" || true
  [ ! -s "${out}/pairs-${kind}.json" ] || pairs+=("${kind}")
done

# 5. Preference training from each, and the scores of all three models.
for kind in ${pairs[@]+"${pairs[@]}"}; do
  "${llava[@]}" train "${common[@]}" --objective dpo --model_name_or_path "${out}/sft" \
    --data_path "${out}/pairs-${kind}.json" --image_folder "${rad}/images" \
    --lora_enable True --lora_r 16 --lora_alpha 32 --freeze_mm_mlp_adapter True \
    --num_train_epochs "${epochs[2]}" --learning_rate 2e-4 --output_dir "${out}/dpo-${kind}"
done
# The scores of preference training are also compared with those before it, question by question.
for model in sft ${pairs[@]+"${pairs[@]/#/dpo-}"}; do
  compared=(${TESTED:+--limit "${TESTED}"})
  [ "${model}" = sft ] || compared+=(--compare "${out}/eval-sft")
  "${llava[@]}" eval --model "${out}/${model}" --data "${rad}/test.json" --train-data "${rad}/train.json" \
    --image-folder "${rad}/images" --out "${out}/eval-${model}" --max-new-tokens 24 ${compared[@]+"${compared[@]}"}
done
