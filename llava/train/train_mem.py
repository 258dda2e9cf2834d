"""Training command with the published name `train_mem.py`: stage 1, stage 2, downstream fine-tuning.

Command:
    torchrun --nnodes=1 --nproc_per_node=8 --master_port=25001 llava/train/train_mem.py \
        --model-name-or-path LM --data-path rows.json --image-folder images --vision-tower TOWER \
        --tune-mm-mlp-adapter True --output-dir checkpoints/stage1
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.train.run import run_sft
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Train as `train.py` does; attention over the flat batch saves memory in both."""
    run_sft(argv, image_grouping="off", bf16=False)


if __name__ == "__main__":
    run_program(main)
