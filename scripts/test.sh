#!/usr/bin/env bash
# Format, lint, types, tests. Every part runs even when an earlier one failed; the status is non-zero if any failed.
#   bash scripts/test.sh [pytest arguments, e.g. tests/data -k encode]
set -uo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev,quickstart || exit 1

bin="${PWD}/.venv/bin"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
failed=""

part() { # $1: name; the rest: the command
    local name="$1"
    shift
    echo "== ${name}"
    "$@" || failed="${failed} ${name}"
}

part "ruff-check" "${bin}/ruff" check .
part "ruff-format" "${bin}/ruff" format --check .
part "mypy" "${bin}/mypy" --strict llava
[ -z "${failed}" ] || echo "== failed before the tests:${failed}"
# Two workers, whole files each: fixtures of a module are built once. Tests that start torchrun set their own threads.
part "pytest" "${bin}/python" -m pytest -n "${LLAVA_TEST_WORKERS:-2}" --dist loadfile --durations=15 -m "not slow" "$@" 2>&1
# DeepSpeed compiles its parts the first time on a machine; these come last and alone.
[ $# -gt 0 ] || part "pytest-slow" "${bin}/python" -m pytest -m slow 2>&1

[ -z "${failed}" ]
