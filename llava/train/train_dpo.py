"""Preference training command with the published name `train_dpo.py`; the same as `train_mem_dpo.py`.

Command:
    torchrun --nproc_per_node=4 llava/train/train_dpo.py --model-name-or-path MODEL --data-path pairs.json ...
"""

from __future__ import annotations

from llava.train.train_mem_dpo import main
from llava.utils.cli import run_program

if __name__ == "__main__":
    run_program(main)
