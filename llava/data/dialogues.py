"""`llava data dialogues`: join questions about one image into dialogues of several turns.

    rows of one question --by images and split, shuffled--> dialogues of up to N questions

A model learns to ask from later questions only (`llava.data.self_questioning`), and most data sets of questions about
images have one question a row. Rows of different splits are never joined.

Command:
    llava data dialogues train.json --turns 5 --seed 0 --out dialogues.json
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.data.records import load_samples
from llava.errors import ConfigError
from llava.samples import Conversation, Sample, to_row, with_placeholders
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import file_text, open_atomic
from llava.utils.terminal import write_out

IDS, TYPES = "question_ids", "answer_types"
"""Fields of a dialogue: the id and the `answer_type` of each of its questions, in order."""

OWN = frozenset({"id", "answer_type"})
"""Fields that belong to one question."""

_MARK = re.compile(rf"\s*{re.escape(IMAGE_TOKEN)}\s*")


def joined_dialogues(samples: Sequence[Sample], *, num_turns: int, seed: int = 0) -> list[Sample]:
    """Return dialogues of the questions about each image; other rows are unchanged.

    Questions about the same images are shuffled and divided into dialogues as equal in length as possible. Other rows
    are those without an image, and those with several questions. The order is that of the first question of each
    dialogue's images.

    Args:
        samples: the rows.
        num_turns: largest number of questions in a dialogue.
        seed: seed of the order of the questions about an image.

    Raises:
        ConfigError: `num_turns` is below 1.
        DataError: a row has another number of placeholders than of images.
    """
    if num_turns < 1:
        raise ConfigError(f"--turns must be at least 1, got {num_turns}")
    groups: dict[Any, list[Sample]] = {}
    for number, sample in enumerate(samples):
        is_single = bool(sample.images) and [turn.role for turn in sample.conversation.turns] == ["human", "gpt"]
        shared = (sample.images, str(sample.meta.get("split")), sample.conversation.system)
        groups.setdefault(shared if is_single else number, []).append(sample)
    found: list[Sample] = []
    for key, members in groups.items():
        if isinstance(key, int) or len(members) == 1:
            found += members
            continue
        random.Random(f"{seed}/{key}").shuffle(members)
        num_dialogues = -(-len(members) // num_turns)
        found += [_dialogue(members[part::num_dialogues]) for part in range(num_dialogues)]
    return found


def _dialogue(members: Sequence[Sample]) -> Sample:
    """Return one dialogue; its images are shown with the first question."""
    first = members[0]
    turns = list(with_placeholders(first).turns)
    for sample in members[1:]:
        question, answer = sample.conversation.turns
        turns += [replace(question, text=_MARK.sub(" ", question.text).strip()), answer]
    meta: dict[str, Any] = {
        name: value
        for name, value in first.meta.items()
        if name not in OWN and all(sample.meta.get(name) == value for sample in members)
    }
    meta |= {IDS: [sample.meta.get("id", sample.id) for sample in members]}
    meta |= {TYPES: [sample.meta.get("answer_type") for sample in members]}
    identity = f"{first.id}+{len(members) - 1}" if len(members) > 1 else first.id
    return Sample(identity, Conversation(tuple(turns), first.conversation.system), first.images, meta, first.origin)


def _summary(before: Sequence[Sample], after: Sequence[Sample]) -> Mapping[str, int]:
    joined = [sample for sample in after if IDS in sample.meta]
    return {
        "rows": len(before),
        "dialogues": len(joined),
        "questions": sum(len(sample.meta[IDS]) for sample in joined),
        "others": len(after) - len(joined),
    }


def make_parser() -> Parser:
    """Return the parser of `llava data dialogues`."""
    parser = Parser(
        prog="llava data dialogues",
        description="Join rows with one question about an image to dialogues of several turns.",
    )
    parser.add_argument("data", type=Path, help="rows in LLaVA format: a JSON array or JSON lines")
    parser.add_argument("--turns", type=int, default=5, help="largest number of questions in a dialogue")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the questions about an image")
    parser.add_argument(
        "--out", type=Path, required=True, help="file to write: JSON lines if its name ends with .jsonl, else an array"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data dialogues`.

    Raises:
        LlavaError: an option is invalid, or a row cannot be used.
    """
    log.setup_logging()
    args = make_parser().parse_args(argv)
    refuse_overwriting([args.data], {"out": args.out})
    samples = load_samples(args.data)
    dialogues = joined_dialogues(samples, num_turns=args.turns, seed=args.seed)
    with open_atomic(args.out) as stream:
        stream.writelines(file_text(map(to_row, dialogues), lines=args.out.suffix == ".jsonl"))
    counts = _summary(samples, dialogues)
    write_out(
        f"{counts['rows']} rows: {counts['questions']} questions in {counts['dialogues']} dialogues, "
        f"{counts['others']} rows unchanged -> {args.out}\n"
    )
