"""Generate dialogues about figures from their captions with a language model.

python llava/instruct/instruct_generate.py \\
    --input-path data/instruct/llava_med_instruct_fig_captions.json \\
    --output-path data/instruct/llava_med_instruct_60k_inline_mentions_gen.jsonl \\
    --max-size 60000 --use-inline-mentions True
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.instruct import generate
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    generate.main(argv, prog="instruct_generate.py")


if __name__ == "__main__":
    run_program(main)
