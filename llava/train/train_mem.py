"""Training command with the published name `train_mem.py`: stage 1, stage 2, downstream fine-tuning.

Command:
    torchrun --nnodes=1 --nproc_per_node=8 --master_port=25001 llava/train/train_mem.py \
        --model-name-or-path LM --data-path rows.json --image-folder images --vision-tower TOWER \
        --tune-mm-mlp-adapter True --output-dir checkpoints/stage1
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.train.command import run_published
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Train as `train.py` does; attention over the flat batch saves memory in both."""
    run_published(
        argv, name="train_mem.py", example="--model-name-or-path LM --vision-tower TOWER --data-path train.json"
    )


if __name__ == "__main__":
    run_program(main)
