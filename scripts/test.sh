#!/usr/bin/env bash
# Format, lint, types, tests. Every part runs even when an earlier one failed; the status is non-zero if any failed.
#   bash scripts/test.sh [--all] [pytest arguments, e.g. tests/data -k encode]
# --all also runs the tests marked `extended`, which take a minute or more each.
set -uo pipefail
cd "$(dirname "$0")/.."
marks="not extended"
if [ "${1:-}" = "--all" ]; then
    marks=""
    shift
fi
# Hundreds of tests start a command: compiled modules are kept between them, whatever the caller's environment says.
export PYTHONDONTWRITEBYTECODE=""
bash scripts/setup.sh dev,quickstart,rad || exit 1

bin="${PWD}/.venv/bin"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
failed=""

part() { # $1: name; the rest: the command
    local name="$1"
    shift
    echo "== ${name}"
    "$@" || failed="${failed} ${name}"
}

checks() {
    part "ruff-check" "${bin}/ruff" check .
    part "ruff-format" "${bin}/ruff" format --check .
    part "mypy" "${bin}/mypy" --num-workers 2 --strict llava scripts/*.py
    [ -z "${failed}" ]
}

if [ "$#" -gt 0 ]; then
    checks
else
    # All tests: the checks run beside them, since the tests do not use the processors all the time, and print at once.
    output="$(mktemp)"
    set -m # a process group of its own, which Ctrl-C ends with the script
    { checks >"${output}" 2>&1; status=$?; echo; cat "${output}"; exit "${status}"; } &
    beside=$!
    set +m
    trap 'kill -- "-${beside}" 2>/dev/null; rm -f "${output}"' EXIT
fi
# Two workers, whole files each: fixtures of a module are built once. Files come in the order of their names, so the
# slow ones of `tests/commands` first: the last ones are short, and no worker waits long for the other one.
# Tests that start torchrun set their own threads.
part "pytest" "${bin}/python" -m pytest -n "${LLAVA_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=40 -m "${marks}" "$@" 2>&1
if [ -n "${beside:-}" ] && ! wait "${beside}"; then
    failed="${failed} checks"
    grep -v "^All checks passed\|already formatted$\|^Success" "${output}"
fi

[ -z "${failed}" ] || { echo "== failed:${failed}"; exit 1; }
