#!/usr/bin/env bash
# LLaVA-Med: answer the questions of a test file in NPROC processes and score the answers with the published rules.
#   MODEL=checkpoints/vqa-rad DATA=data/vqa_rad/test.json IMAGES=data/vqa_rad/images \
#       bash scripts/llava_med/eval_med_dataset_batch.sh [more options of answering]
# ANSWERS is the answer file (default: MODEL/test-answer-file.jsonl); CANDIDATE a file of candidate answers.
set -euo pipefail
source "$(dirname "$0")/common.sh"

need_model MODEL
need_path DATA
need_path IMAGES
[ -z "${CANDIDATE:-}" ] || need_path CANDIDATE
[ -z "${NPROC:-}" ] || need_integer NPROC
find_python
gpus="$(count_gpus)"
answers="${ANSWERS:-${MODEL}/test-answer-file.jsonl}"
"${python}" "${root}/llava/eval/run_med_datasets_eval_batch.py" --num-chunks "${NPROC:-$((gpus > 0 ? gpus : 1))}" \
    --model-name "${MODEL}" --question-file "${DATA}" --image-folder "${IMAGES}" --answers-file "${answers}" "$@"
exec "${python}" "${root}/llava/eval/run_eval.py" --gt "${DATA}" --pred "${answers}" ${CANDIDATE:+--candidate "${CANDIDATE}"}
