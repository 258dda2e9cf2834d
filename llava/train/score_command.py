"""`llava preferences score` before torch: help and the file to write; then the scorer.

The command takes the options of `llava train`, so that model, template, images and lengths are those of the training.

Command:
    llava preferences score --out reference.jsonl --model-name-or-path MODEL --data-path pairs.json --image-folder DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.errors import ConfigError
from llava.train.command import expanded, wants_help
from llava.utils import log

HELP = """usage: llava preferences score --out FILE --model-name-or-path MODEL --data-path PAIRS [--OPTION VALUE ...]

Write the log-probability of each side of the pairs under the model with which a training would start. A killed run
continues with what FILE.parts holds.

  --out FILE    file to write, JSON lines; `llava train --objective dpo --ref-logprobs FILE` reads it

All other options are those of the training for which the file is made: llava train --help all
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava preferences score`; killed, it continues with what `FILE.parts` holds."""
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        sys.stdout.write(HELP)
        return
    parser = argparse.ArgumentParser(prog="llava preferences score", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    own, rest = parser.parse_known_args(words)
    if own.out is None:
        raise ConfigError("--out is missing; expected the file to write, such as reference.jsonl")
    log.setup_logging()
    from llava.train.parsing import parse_training_args
    from llava.train.score_preferences import score

    score(parse_training_args([*expanded(rest), "--objective", "dpo"], bf16="auto"), own.out)
