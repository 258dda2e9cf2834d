#!/usr/bin/env bash
# Reinforcement learning of Dr-LLaVA (PPO) with the published values; its paths are arguments.
#   bash scripts/train_rl_model.sh MODEL RULES ROWS.json IMAGE_FOLDER OUT [more options]
# MODEL is the fine-tuned model, RULES a rule file or the name of a shipped rule set (bone-marrow-aspirate), ROWS.json a
# table with labels, or dialogues of `llava rules dialogues`. Options that follow replace those here.
# torchrun starts NPROC processes (default 1; published: 4); LAUNCH replaces it, for example on several machines.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
usage="usage: train_rl_model.sh MODEL RULES ROWS.json IMAGE_FOLDER OUT [more options]"
model="${1:?${usage}}" rules="${2:?${usage}}" rows="${3:?${usage}}" images="${4:?${usage}}" out="${5:?${usage}}"
shift 5

read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc_per_node=${NPROC:-1}}"
"${launch[@]}" "${root}/llava/train/train_rl.py" \
  --objective ppo --rules "${rules}" --preset drllava-2024-11 --compat drllava \
  --base_model_name "${model}" --policy_model_name_or_path "${model}" \
  --dataset_path "${rows}" --train_splits train --image_folder "${images}" --output_dir "${out}" \
  --lora_enable True --lora_r 64 --lora_alpha 16 --lora_dropout 0.0 \
  --rollout_batch_size 512 --step_batch_size 256 \
  --rollout_per_device_batch_size 32 --reward_model_per_device_batch_size 8 --step_per_device_batch_size 8 \
  --learning_rate 3e-5 --lr_scheduler_type cosine --warmup_steps 5 --weight_decay 0.0 --max_grad_norm 1.0 \
  --total_epochs 4 --noptepochs 2 --kl_coef 0.1 --whiten_rewards True --whitening_async_stats full_batch \
  --init_value_with_reward False --value_model adapter \
  --penalize_no_stop_token True --relative_stop_token_penalty True --penalty_reward_value -2.0 \
  --length_bonus_score -10.0 --correct_bonus_score 2.0 --clean_tokens_after_eos True \
  --query_len 256 --response_len 224 --temperature 1.0 --resume_from_training True \
  --save_steps 10 --save_total_limit 100000 --logging_steps 1 --report_to tensorboard "$@"
