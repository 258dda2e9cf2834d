# What the scripts of LLaVA-Med share; to be sourced, not run.
# Environment: MODEL, DATA, IMAGES (required), OUT; VISION_TOWER, EPOCHS, BATCH, ACCUMULATION replace the published values.
# Processes: NPROC on this machine (default: its GPUs); on several machines NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
# DEEPSPEED is a DeepSpeed configuration (scripts/zero2.json), instead of the published FSDP; LAUNCH another launcher.
root="$(cd "$(dirname "$0")/../.." && pwd)"
source "${root}/scripts/common.sh"

check_paths() { # checks what a training needs, before anything is started
    need_model MODEL
    need_path DATA
    need_path IMAGES
    VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14}"
    need_model VISION_TOWER
    [ -z "${DEEPSPEED:-}" ] || need_path DEEPSPEED
    need_number EPOCHS
    for name in BATCH ACCUMULATION NPROC NNODES NODE_RANK MASTER_PORT; do
        [ -z "${!name:-}" ] || need_integer "${name}"
    done
    if [ "${NNODES:-1}" -gt 1 ]; then
        [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] ||
            fail "NNODES=${NNODES} also needs NODE_RANK (0 to $((NNODES - 1))) and MASTER_ADDR, the first machine"
    fi
}

need_integer() { # $1: name of a variable
    case "${!1}" in
    '' | *[!0-9]*) fail "$1 must be a whole number, got ${!1}" ;;
    esac
}

need_number() { # $1: name of a variable with a number above 0; unset is fine
    [ -z "${!1:-}" ] || awk -v number="${!1}" 'BEGIN { exit !(number ~ /^[0-9]*\.?[0-9]+$/ && number > 0) }' ||
        fail "$1 must be a number above 0, got ${!1}"
}

shard() { # sets `sharding`: DeepSpeed if a configuration is given, else the published FSDP
    if [ -n "${DEEPSPEED:-}" ]; then
        sharding=(--deepspeed "${DEEPSPEED}")
    else
        sharding=(--fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer)
    fi
}

train() { # $1: script of training; the rest: its options. Starts it with torchrun
    find_python
    local gpus
    gpus="$(count_gpus)"
    if [ -n "${LAUNCH:-}" ]; then
        read -ra launch <<<"${LAUNCH}"
    else
        launch=("${python}" -m torch.distributed.run "--nnodes=${NNODES:-1}" "--nproc_per_node=${NPROC:-$((gpus > 0 ? gpus : 1))}"
            "--node_rank=${NODE_RANK:-0}" "--master_addr=${MASTER_ADDR:-127.0.0.1}" "--master_port=${MASTER_PORT:-25001}")
    fi
    exec "${launch[@]}" "${root}/llava/train/train_mem.py" --model_name_or_path "${MODEL}" --data_path "${DATA}" \
        --image_folder "${IMAGES}" --vision_tower "${VISION_TOWER}" --mm_vision_select_layer -2 \
        --mm_use_im_start_end True --per_device_eval_batch_size 4 --evaluation_strategy no --save_strategy steps \
        --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 \
        --model_max_length 2048 --gradient_checkpointing True --lazy_preprocess True "$@"
}

tune() { # $1: default output folder, $2: default epochs; the rest: more options. Stage 2 and its successors
    local out="${OUT:-$1}" epochs="${EPOCHS:-$2}"
    shift 2
    shard
    train "${sharding[@]}" --output_dir "${out}" --num_train_epochs "${epochs}" \
        --per_device_train_batch_size "${BATCH:-1}" --gradient_accumulation_steps "${ACCUMULATION:-8}" \
        --learning_rate 2e-5 --save_steps 5000 --save_total_limit 3 --bf16 True --tf32 True --report_to none "$@"
}
