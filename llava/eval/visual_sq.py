"""Let a model ask questions about the images of a folder.

python llava/eval/visual_sq.py --model_path CHECKPOINT --image-folder images --answers-file questions.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.utils.cli import run_program, run_target


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_target("llava.instruct.ask:published_main", argv)


if __name__ == "__main__":
    run_program(main)
