"""Score all medical VQA answer files under a folder.

python llava/eval/run_eval_batch.py --pred_file_parent_path answers --target_test_type test-answer-file --gt-root data
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.medvqa import cli
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    cli.run_eval_batch(argv)


if __name__ == "__main__":
    run_program(main)
