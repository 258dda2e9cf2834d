"""Answer medical VQA questions with one process per chunk and join the answers in order.

python llava/eval/run_med_datasets_eval_batch.py --num-chunks 8 --model-name CHECKPOINT \\
    --question-file vqa_rad/test.json --image-folder vqa_rad/images --answers-file test-answer-file.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval import answering
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    answering.run_batch(argv)


if __name__ == "__main__":
    run_program(main)
