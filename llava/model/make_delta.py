"""Write the difference between a model and its base.

python3 -m llava.model.make_delta --base /path/to/llama-7b --target /path/to/model --delta /path/to/delta
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.model.checkpoint.tools.cli import make_delta
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    make_delta(argv)


if __name__ == "__main__":
    run_program(main)
