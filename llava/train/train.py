"""Training command with the published name `train.py`.

Command:
    torchrun --nproc_per_node=8 llava/train/train.py --model-name-or-path LM --vision-tower TOWER ...
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.train.command import run_published
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Train with rows in random order, as the original trainers do."""
    run_published(argv, name="train.py", example="--model-name-or-path LM --vision-tower TOWER --data-path train.json")


if __name__ == "__main__":
    run_program(main)
