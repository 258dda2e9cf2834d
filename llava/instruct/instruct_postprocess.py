"""Convert generated dialogues to training data: turns, image placeholder, no mention of captions.

python llava/instruct/instruct_postprocess.py \\
    --input-path data/instruct/llava_med_instruct_60k_inline_mentions_gen.jsonl \\
    --output-path data/instruct/llava_med_instruct_60k_inline_mentions_post.json
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.instruct import postprocess
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    postprocess.main(argv, prog="instruct_postprocess.py")


if __name__ == "__main__":
    run_program(main)
