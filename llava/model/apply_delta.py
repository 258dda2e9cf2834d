"""Add a delta to its base.

python3 -m llava.model.apply_delta --base /path/to/llama-7b --target /path/to/LLaVA-7b-v0 --delta /path/to/delta
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.model.checkpoint.tools.cli import apply_delta
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    apply_delta(argv)


if __name__ == "__main__":
    run_program(main)
