"""Score one medical VQA answer file.

python llava/eval/run_eval.py --gt vqa_rad/test.json --pred test-answer-file.jsonl --candidate vqa_rad/train.json
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.medvqa import cli
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    cli.run_eval(argv)


if __name__ == "__main__":
    run_program(main)
