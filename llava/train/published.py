"""Entry of the training scripts with published names: help without torch, then the trainer with the published defaults.

llava/train/train_mem.py, train.py, train_mem_dpo.py, train_dpo.py, train_rl.py --words--> run_sft
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.train.command import wants_help
from llava.train.help import help_text
from llava.utils.cli import with_dashes
from llava.utils.help_groups import asks_for_all


def run_published(argv: Sequence[str] | None, *, name: str, example: str, first: Sequence[str] = ()) -> None:
    """Train as a published script does, or print its help.

    Args:
        argv: command line; None for that of the process.
        name: name of the script.
        example: options of an example in its help.
        first: options that the command line may replace.

    Raises:
        LlavaError: as `llava.train.run.run_sft`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        sys.stdout.write(help_text(name, example=example, full=asks_for_all(with_dashes(words))))
        return
    from llava.train.run import run_sft  # loads torch

    run_sft([*first, *words], image_grouping="off", bf16=False)
