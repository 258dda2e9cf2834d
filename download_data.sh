#!/bin/sh
# Fetch the published data files into data/, check them, then fetch their images:
#     sh download_data.sh
# Stopped or killed, the same line continues. What it can do else: sh download_data.sh --help
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
elif command -v python3 >/dev/null 2>&1; then
    python=python3
else
    echo "download_data.sh: no Python found; run: bash scripts/setup.sh" >&2
    exit 2
fi
needed='import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("httpx2", "tqdm", "PIL", "numpy"))))'
if ! "$python" -c "$needed" 2>/dev/null; then
    echo "download_data.sh: $python lacks packages of this project; run: bash scripts/setup.sh" >&2
    exit 2
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m llava.cli data download "$@"
