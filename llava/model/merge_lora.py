"""Merge a LoRA adapter into its base.

python scripts/merge_lora_weights.py --model-path ADAPTER --model-base vicuna-7b-v1.5 --save-model-path MERGED
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.model.checkpoint.tools.cli import merge_lora_weights
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    merge_lora_weights(argv)


if __name__ == "__main__":
    run_program(main)
