# Functions of the scripts that take their paths from the environment; to be sourced, not run.
# A script defines `root`, the repository, before it sources this file.

fail() { # $1: message; ends with status 2
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}

need_path() { # $1: name of a variable; ends unless it holds an existing file or folder
    local value="${!1:-}"
    [ -n "${value}" ] || fail "$1 is not set; pass its path, e.g. $1=/path/to/it bash $0"
    [ -e "${value}" ] || fail "$1=${value} does not exist"
}

need_model() { # $1: name of a variable with a folder or a hub name; a path, unlike a hub name, must exist
    local value="${!1:-}"
    [ -n "${value}" ] || fail "$1 is not set; expected a folder or a hub name such as owner/model"
    case "${value}" in
    /* | ./* | ../* | ~* | */*/*) [ -e "${value}" ] || fail "$1=${value} does not exist" ;;
    esac
}

take_words() { # $1: largest number; the rest: arguments. Sets `words` (before the first option) and `options` (the rest)
    local limit="$1"
    shift
    words=()
    while [ $# -gt 0 ] && [ "${#words[@]}" -lt "${limit}" ] && [[ "$1" != --* ]]; do
        words+=("$1")
        shift
    done
    options=("$@")
}

find_python() { # sets `python`: of the repository's environment, else the active one; without llava in it, sets it up
    python="${PYTHON:-}"
    [ -n "${python}" ] || python="${root}/.venv/bin/python"
    [ -x "${python}" ] || python="$(command -v python3 || command -v python || true)"
    if ! "${python:-false}" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "transformers"))))' 2>/dev/null; then
        bash "${root}/scripts/setup.sh" train
        python="${root}/.venv/bin/python"
    fi
    export PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}"
}

count_gpus() { # prints the number of visible GPUs, without loading torch
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        local devices="${CUDA_VISIBLE_DEVICES//,/ }"
        set -- ${devices}
        echo "$#"
    elif command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

find_launcher() { # sets `launch` and `is_deepspeed`; LAUNCH replaces the choice, NPROC is the number of processes
    is_deepspeed=""
    local gpus
    gpus="$(count_gpus)"
    if [ -n "${LAUNCH:-}" ]; then
        read -ra launch <<<"${LAUNCH}"
        [ "$(basename "${launch[0]}")" != deepspeed ] || is_deepspeed=1
    elif [ "${gpus}" -gt 0 ] && "${python}" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)'; then
        launch=("${python}" -m deepspeed.launcher.runner)
        [ -z "${NPROC:-}" ] || launch+=(--num_gpus "${NPROC}")
        is_deepspeed=1
    elif [ "${NPROC:-${gpus}}" -gt 1 ]; then
        launch=("${python}" -m torch.distributed.run --standalone "--nproc_per_node=${NPROC:-${gpus}}")
    else
        launch=("${python}")
    fi
}
