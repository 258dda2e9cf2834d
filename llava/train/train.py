"""Train, attention chosen by transformers where no shared beginnings are at hand.

Command:
    torchrun --nproc_per_node=8 llava/train/train.py --model_name_or_path LM --vision_tower TOWER ...
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.train.run import run_sft
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Rows in their original random order, as the seeds train."""
    run_sft(argv, image_grouping="off", bf16=False)


if __name__ == "__main__":
    run_program(main)
