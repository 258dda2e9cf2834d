"""Answer medical VQA questions.

python llava/eval/model_vqa_med.py --model-name CHECKPOINT --question-file vqa_rad/test.json --image-folder images \\
    --answers-file answers.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval import answering
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    answering.model_vqa_med(argv)


if __name__ == "__main__":
    run_program(main)
