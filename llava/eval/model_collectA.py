"""Sample two answers to each question that a model asked.

python llava/eval/model_collectA.py --model_path CHECKPOINT --image-folder images --question_file questions.jsonl \\
    --answers_file answers.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.utils.cli import run_program, run_target


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_target("llava.instruct.preferences.answer:published_main", argv)


if __name__ == "__main__":
    run_program(main)
