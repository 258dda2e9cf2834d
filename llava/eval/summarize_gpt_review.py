"""Summarize the scores that judges gave to chat answers.

python llava/eval/summarize_gpt_review.py --scores-file scores.jsonl --against other-judge.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.judge import cli
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    cli.summarize_main(argv)


if __name__ == "__main__":
    run_program(main)
