# What scripts/pretrain.sh and scripts/finetune_lora.sh share; to be sourced, not run.
# Environment, with the published names: data_path and image_folder (required), PROJECTOR (finetune_lora.sh, required);
# model_base, vision_tower, vision_tower_config, vision_tower_checkpoint, loader and conv_mode replace the defaults.
# NPROC is the number of processes, ZERO a DeepSpeed configuration, LAUNCH another launcher, RUN_NAME a run to resume.
root="$(cd "$(dirname "$0")/.." && pwd)"
source "${root}/scripts/common.sh"

check_paths() {
    need_path data_path
    need_path image_folder
    model_base="${model_base:-lmsys/vicuna-7b-v1.5}"
    need_model model_base
    loader="${loader:-mimic_train_findings}"
    local default=biomedclip_cxr_518
    vision_tower="${vision_tower:-${default}}"
    if [ "${vision_tower}" = "${default}" ]; then
        local configs="${root}/llava/model/multimodal_encoder/open_clip_encoder/model_configs"
        vision_tower_config="${vision_tower_config:-${configs}/biomedclip_cxr_518.json}"
        vision_tower_checkpoint="${vision_tower_checkpoint:-biomedclipcxr_518_checkpoint.pt}"
    else
        need_model vision_tower
    fi
    [ -z "${vision_tower_config:-}" ] || need_model vision_tower_config
    [ -z "${vision_tower_checkpoint:-}" ] || need_model vision_tower_checkpoint
}

save_share() { # $1: epochs; prints the share of all steps between two checkpoints: four checkpoints an epoch
    awk -v epochs="$1" 'BEGIN { if (epochs !~ /^[0-9]*\.?[0-9]+$/ || epochs <= 0) exit 1; printf "%.6g", 0.25 / (epochs > 1 ? epochs : 1) }' ||
        fail "EPOCHS must be a number above 0, got $1"
}

need_whole() { # $1: name in messages, $2: value
    [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a whole number above 0, got $2"
}

train() { # $1: kind in the run name, $2: output root, $3: epochs, $4: learning rate; the rest: options
    local kind="$1" out="$2" epochs="$3" rate="$4" name steps group tower=()
    shift 4
    steps="$(save_share "${epochs}")"
    find_python
    find_launcher
    name="$(basename "${vision_tower}")"
    name="${RUN_NAME:-${name}-${kind}-${epochs}e-${rate}-$(date +%Y%m%d%H%M%S)}"
    echo "${name}" >run_name
    [ -z "${vision_tower_config:-}" ] || tower+=(--vision_tower_config "${vision_tower_config}")
    [ -z "${vision_tower_checkpoint:-}" ] || tower+=(--vision_tower_checkpoint "${vision_tower_checkpoint}")
    [ -z "${is_deepspeed}" ] || ZERO="${ZERO:-${root}/scripts/zero2.json}"
    [ -z "${ZERO:-}" ] || tower+=(--deepspeed "${ZERO}")
    [ "${kind}" = pt ] && group=pre-train || group=fine-tune
    export WANDB_PROJECT="${WANDB_PROJECT:-llava}" WANDB_RUN_GROUP="${WANDB_RUN_GROUP:-${group}}"
    "${launch[@]}" "${root}/llava/train/train_mem.py" \
        --model_name_or_path "${model_base}" --data_path "${data_path}" --loader "${loader}" \
        --image_folder "${image_folder}" --vision_tower "${vision_tower}" "${tower[@]}" \
        --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 \
        --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio square \
        --bf16 True --tf32 True --output_dir "${out}/${name}" --num_train_epochs "${epochs}" \
        --per_device_eval_batch_size 4 --evaluation_strategy no \
        --save_strategy steps --save_steps "${steps}" --save_total_limit 1 \
        --learning_rate "${rate}" --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
        --logging_steps 1 --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 \
        --lazy_preprocess True --report_to wandb --run_name "${name}" "$@"
    echo "saved in ${out}/${name}"
}
