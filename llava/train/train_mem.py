"""Train with the memory-saving attention: stage 1, stage 2 and downstream fine-tuning of the seeds.

Command:
    torchrun --nnodes=1 --nproc_per_node=8 --master_port=25001 llava/train/train_mem.py \
        --model_name_or_path LM --data_path rows.json --image_folder images --vision_tower TOWER \
        --tune_mm_mlp_adapter True --output_dir checkpoints/stage1
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.train.run import run_sft
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """The same as `train.py`: the flat batch attends tree by tree on every device."""
    run_sft(argv, image_grouping="off", bf16=False)


if __name__ == "__main__":
    run_program(main)
