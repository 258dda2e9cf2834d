"""Preference training command with the published name `train_mem_dpo.py`.

Command:
    torchrun --nproc_per_node=4 llava/train/train_mem_dpo.py --model-name-or-path MODEL --version v1 \
        --data-path pairs.json --image-folder images --lora-enable True --output-dir checkpoints/dpo
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.train.command import run_published
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Train on pairs, in random order as the original trainer does."""
    run_published(
        argv,
        name="train_mem_dpo.py",
        example="--model-name-or-path MODEL --data-path pairs.json",
        first=["--objective", "dpo"],
    )


if __name__ == "__main__":
    run_program(main)
