"""Answer the questions of a chat evaluation.

python llava/eval/model_vqa.py --model-name CHECKPOINT --question-file questions.jsonl --image-folder images \\
    --answers-file answers.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval import answering
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    answering.model_vqa(argv)


if __name__ == "__main__":
    run_program(main)
