"""Rewrite a checkpoint with one dtype, even shards and no training state.

python3 -m llava.model.consolidate --src /path/to/checkpoint --dst /path/to/new
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.model.checkpoint.tools.cli import consolidate_main
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    consolidate_main(argv)


if __name__ == "__main__":
    run_program(main)
