"""Merge a LoRA adapter into its base, by the path that the originals' documents name.

python scripts/merge_lora_weights.py --model-path ADAPTER --model-base vicuna-7b-v1.5 --save-model-path MERGED
"""

from __future__ import annotations

from llava.model.merge_lora import main
from llava.utils.cli import run_program

if __name__ == "__main__":
    run_program(main)
