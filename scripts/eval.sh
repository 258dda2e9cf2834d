#!/usr/bin/env bash
# LLaVA-Rad, inference and scores: one process per GPU writes a chunk, the chunks are joined and scored.
#   query_file=chat_test.json image_folder=files bash scripts/eval.sh [MODEL_BASE] [MODEL_PATH] \
#       [PREDICTION_DIR=results/llavarad] [RUN_NAME=llavarad] [more options of llava.eval.model_mimic_cxr]
# The environment may set loader, conv_mode and model_base, and NUM_CHUNKS (default: one chunk per GPU; 1 on a CPU).
# MODEL_BASE "" is for a checkpoint that needs no base. A stopped run continues with the same command.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
source "${root}/scripts/common.sh"

take_words 4 "$@"
model_base="${words[0]-${model_base-lmsys/vicuna-7b-v1.5}}"
model_path="${words[1]:-microsoft/llava-rad}"
folder="${words[2]:-results/llavarad}"
run_name="${words[3]:-llavarad}"
need_path query_file
need_path image_folder
[ -z "${model_base}" ] || need_model model_base
need_model model_path
num_chunks="${NUM_CHUNKS:-$(count_gpus)}"
[[ "${num_chunks}" =~ ^[0-9]+$ ]] || fail "NUM_CHUNKS must be a whole number, got ${num_chunks}"
[ "${num_chunks}" -gt 0 ] || num_chunks=1
IFS=',' read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-}"
[ "${#devices[@]}" -gt 0 ] || read -ra devices <<<"$(seq -s ' ' 0 $(($(count_gpus) - 1)))"

find_python
mkdir -p "${folder}"
program=("${python}" -m llava.eval.model_mimic_cxr)
if [ "${num_chunks}" -gt 1 ] || [ -n "$(ls "${folder}" 2>/dev/null)" ]; then
    "${program[@]}" join --folder "${folder}" --num_chunks "${num_chunks}" # stale chunks, before a model is loaded
fi
base=()
[ -z "${model_base}" ] || base=(--model_base "${model_base}")
tied=() # a killed script must not leave processes that still write its chunks
! command -v setpriv >/dev/null || tied=(setpriv --pdeathsig KILL)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
for ((index = 0; index < num_chunks; index++)); do
    device=()
    [ "${#devices[@]}" -eq 0 ] || device=("CUDA_VISIBLE_DEVICES=${devices[index % ${#devices[@]}]}")
    "${tied[@]}" env "${device[@]}" "${program[@]}" --query_file "${query_file}" --loader "${loader:-mimic_test_findings}" \
        --image_folder "${image_folder}" --conv_mode "${conv_mode:-v1}" --model_path "${model_path}" "${base[@]}" \
        --prediction_file "${folder}/test_${index}.jsonl" --temperature 0 --batch_size 8 --group_by_length \
        --chunk_idx "${index}" --num_chunks "${num_chunks}" "${options[@]}" &
    pids+=("$!")
done
failed=()
for index in "${!pids[@]}"; do
    wait "${pids[index]}" || failed+=("${index}")
done
[ "${#failed[@]}" -eq 0 ] || fail "chunks ${failed[*]} of ${num_chunks} failed (see above); the same command resumes"
"${program[@]}" join --folder "${folder}" --num_chunks "${num_chunks}" --out "${folder}/mimic_cxr_preds.jsonl"
"${python}" "${root}/llava/eval/rrg_eval/run.py" "${folder}/mimic_cxr_preds.jsonl" \
    --run_name "${run_name}" --output_dir "${folder}/eval"
