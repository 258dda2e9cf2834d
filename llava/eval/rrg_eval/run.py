"""Score predicted chest X-ray reports against their references.

python run.py predictions.jsonl --output_dir scores
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.reports import cli
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    cli.score_main(argv, prog="run.py")


if __name__ == "__main__":
    run_program(main)
