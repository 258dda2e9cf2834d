# Functions of both published stages of STLLaVA-Med; to be sourced, not run.
# LAUNCH="deepspeed" starts with DeepSpeed's launcher; otherwise torchrun starts NPROC processes (default 1).
# ZERO=scripts/zero3.json shards weights with DeepSpeed.

train_stage() { # $1: entry; $2: name of the rows in the usage; the options of the stage, "--", and the script's arguments
    local entry="$1" rows_name="$2" stage=()
    shift 2
    while [ "$1" != -- ]; do
        stage+=("$1")
        shift
    done
    shift
    local usage="usage: $(basename "$0") MODEL VISION_TOWER PROJECTOR ${rows_name} IMAGE_FOLDER OUT [more options]"
    local model="${1:?${usage}}" tower="${2-}" projector="${3-}"
    local rows="${4:?${usage}}" images="${5:?${usage}}" out="${6:?${usage}}"
    shift 6
    local parts=() launch root
    root="$(cd "$(dirname "$0")/.." && pwd)"
    [ -z "${tower}" ] || parts+=(--vision_tower "${tower}")
    [ -z "${projector}" ] || parts+=(--pretrain_mm_mlp_adapter "${projector}")
    [ -z "${ZERO:-}" ] || parts+=(--deepspeed "${ZERO}")
    read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc_per_node=${NPROC:-1}}"
    "${launch[@]}" "${root}/llava/train/${entry}" \
        --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --model_name_or_path "${model}" \
        --data_path "${rows}" --image_folder "${images}" ${parts[@]+"${parts[@]}"} --mm_projector_type cluster \
        --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False \
        --image_aspect_ratio pad --group_by_modality_length False --bf16 True --output_dir "${out}" \
        --evaluation_strategy no --save_strategy steps --save_steps 50000 --vit_lora_enable --lora_alpha_vit 64 \
        --lora_r_vit 32 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 \
        --tf32 True --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 8 \
        --lazy_preprocess True --report_to wandb --data_aug False "${stage[@]}" "$@"
}
