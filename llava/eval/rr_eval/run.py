"""Score predicted reports: the published spelling of `llava/eval/rrg_eval/run.py`.

python run.py predictions.jsonl --output_dir scores
"""

from __future__ import annotations

from llava.eval.rrg_eval.run import main
from llava.utils.cli import run_program

if __name__ == "__main__":
    run_program(main)
