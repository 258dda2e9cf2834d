"""Reinforcement learning with the name and the options of the published command of Dr-LLaVA.

Command:
    torchrun --nproc_per_node=4 llava/train/train_rl.py --rules bone-marrow-aspirate --base_model_name MODEL \
        --dataset_path rows.json --image_folder images --rollout_batch_size 512 --output_dir checkpoints/ppo
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.train.command import run_published
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Train by PPO, unless `--objective` names another algorithm."""
    run_published(
        argv,
        name="train_rl.py",
        example="--model-name-or-path MODEL --rules RULES --data-path rows.json",
        first=["--objective", "ppo"],
    )


if __name__ == "__main__":
    run_program(main)
