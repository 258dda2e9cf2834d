#!/usr/bin/env bash
# Findings of chest X-rays from small parts, with the baselines that a score needs; see docs/results.md.
#   bash scripts/findings_small.sh DATA_ROOT OUT [more options of scripts/findings_small.py]
# DATA_ROOT holds cxr-notes/ (train.json, test.json, images/). SmolLM2-135M and DINOv2-Small, text-only warm-up on the
# reports of the package torchxrayvision, then the X-rays of cxr-notes. The forecast is printed first, and the warm-up is
# shortened to fit --minutes (default 60). LM and TOWER (paths or hub names) replace the parts.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
data="${1:?usage: findings_small.sh DATA_ROOT OUT}"
out="${2:?usage: findings_small.sh DATA_ROOT OUT}"
shift 2
[ -d "${data}/cxr-notes/images" ] || { echo "findings_small.sh: error: ${data}/cxr-notes/images does not exist" >&2; exit 2; }
bash "${root}/scripts/setup.sh" quickstart,rad
export PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}"
exec "${root}/.venv/bin/python" "${root}/scripts/findings_small.py" --data-root "${data}" --out "${out}" \
    ${LM:+--lm "${LM}"} ${TOWER:+--vision-tower "${TOWER}"} "$@"
