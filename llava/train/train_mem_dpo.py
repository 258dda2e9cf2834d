"""Preference training command with the published name `train_mem_dpo.py`.

Command:
    torchrun --nproc_per_node=4 llava/train/train_mem_dpo.py --model-name-or-path MODEL --version v1 \
        --data-path pairs.json --image-folder images --lora-enable True --output-dir checkpoints/dpo
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.train.run import run_sft
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Train on pairs, in random order as the original trainer does."""
    words = sys.argv[1:] if argv is None else argv
    run_sft(["--objective", "dpo", *words], image_grouping="off", bf16=False)


if __name__ == "__main__":
    run_program(main)
