"""Cases of reinforcement learning: rows with an image and a truth, and the questions of a rollout.

table row  --labels--> truth --style, phrases, new in every rollout--> questions and reference answers
dialogue of `llava rules dialogues` --as it is written--> questions and reference answers
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.samples import Conversation, Origin, Turn
from llava.symbolic.dialogues import dialogue_row
from llava.symbolic.labels import assign
from llava.symbolic.structure import Assignment, RuleSet
from llava.utils.json_rows import read_rows


@dataclass(frozen=True, slots=True)
class RolloutCase:
    """Row of the training data.

    Attributes:
        id: id of the row, or its number.
        image: name of its image.
        truth: true value of each node.
        origin: file and row.
        row: the row.
        is_dialogue: whether the row holds its questions and references.
    """

    id: str
    image: str
    truth: Assignment
    origin: Origin
    row: Mapping[str, Any] = field(repr=False)
    is_dialogue: bool


@dataclass(frozen=True, slots=True)
class AskedCase:
    """Questions about a case, the same for all dialogues of a group.

    Attributes:
        case: the case.
        style: order of the questions.
        asked: asked nodes, one a turn.
        questions: text of each turn; the first has the image.
        references: reference answers.
        seed: seed of the sampled answers.
    """

    case: RolloutCase
    style: str
    asked: tuple[str, ...]
    questions: tuple[str, ...]
    references: tuple[str, ...]
    seed: int

    @property
    def opening(self) -> Conversation:
        """Return the conversation of the first question."""
        return Conversation((Turn("human", self.questions[0]),))

    @property
    def answered(self) -> Conversation:
        """Return the conversation with the reference answers."""
        pairs = zip(self.questions, self.references, strict=True)
        return Conversation(tuple(turn for q, a in pairs for turn in (Turn("human", q), Turn("gpt", a))))


def seed_of(*parts: object) -> int:
    """Return a seed that differs for different parts, the same in every process."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:6], "big")


def read_cases(path: str | Path, rules: RuleSet, *, splits: Sequence[str] = ("train",)) -> list[RolloutCase]:
    """Return the cases of a file.

    Args:
        path: rows of a table, or dialogues of `llava rules dialogues`: a JSON array or JSON lines.
        rules: the rules.
        splits: rows with another value of `split` are left out.

    Raises:
        DataError: a row has no image or label, or a truth that no valid path holds; the message names file and row.
    """
    cases = []
    for number, value in read_rows(path):
        origin = Origin(str(path), number)
        try:
            if isinstance(value, DataError):
                raise value
            if not isinstance(value, dict):
                raise DataError(f"expected an object, got {type(value).__name__}")
            if value.get("split", splits[0]) in splits:
                case = _read_case(value, rules, origin)
                if case.is_dialogue or rules.asked(case.truth):  # for some rows no question is left to ask
                    cases.append(case)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
    if not cases:
        raise DataError(f"{path}: no row of split {', '.join(splits)}; expected rows with an image and a label")
    return cases


def _read_case(row: Mapping[str, Any], rules: RuleSet, origin: Origin) -> RolloutCase:
    image = row.get("image")
    if not isinstance(image, str) or not image:
        raise DataError("key 'image' is missing; expected the name of an image file")
    is_dialogue = "asked" in row and "truth" in row
    truth = _written_truth(row, rules) if is_dialogue else assign(rules, row)
    if broken := rules.violations(truth):
        raise DataError(
            f"its truth is on no valid path (it breaks {', '.join(broken)}); fix the label, or the rules of {rules.id}"
        )
    case = RolloutCase(str(row.get("id", origin.row)), image, truth, origin, row, is_dialogue)
    if is_dialogue:
        _check_dialogue(case, rules)
    elif rules.phrases is None:
        raise DataError(f"{rules.path} has no phrases to ask with; name a phrase file, or pass dialogues as data")
    return case


def _written_truth(row: Mapping[str, Any], rules: RuleSet) -> Assignment:
    truth = row["truth"]
    if not isinstance(truth, Mapping):
        raise DataError("truth: expected an object {node: value}")
    for id, value in truth.items():
        known = rules.by_id[id].values if id in rules.by_id else ()
        if value not in known:
            raise DataError(f"truth of {str(id)[:80]!r}: unknown value {str(value)[:80]!r}; known: {', '.join(known)}")
    return dict(truth)


def _check_dialogue(case: RolloutCase, rules: RuleSet) -> None:
    asked, turns = case.row["asked"], case.row.get("conversations")
    if not isinstance(asked, Sequence) or isinstance(asked, str) or not asked:
        raise DataError("asked: expected a list of nodes")
    unknown = [str(id)[:80] for id in asked if not isinstance(id, str) or id not in rules.by_id or id not in case.truth]
    if unknown:
        raise DataError(f"asked: {', '.join(unknown)} has no truth; known nodes: {', '.join(rules.by_id)}")
    if not isinstance(turns, Sequence) or len(turns) != 2 * len(asked):
        raise DataError(f"conversations: expected a question and an answer for each of {len(asked)} asked nodes")
    for place, turn in enumerate(turns):
        role = ("human", "gpt")[place % 2]
        if not isinstance(turn, Mapping) or turn.get("from") != role or not isinstance(turn.get("value"), str):
            raise DataError(f"conversations, turn {place}: expected a text 'value' from {role}")


def interview(case: RolloutCase, rules: RuleSet, *, seed: int, styles: Sequence[str] = ()) -> AskedCase:
    """Return the questions about a case.

    Args:
        case: the case.
        rules: the rules.
        seed: seed of wordings, order and answers.
        styles: orders that are drawn equally; empty for the weights of the rule file. Dialogues are asked as written.
    """
    row = case.row
    if not case.is_dialogue:
        style = random.Random(seed).choice(list(styles)) if styles else None
        row = dialogue_row(rules, case.row, seed=seed, style=style)
    texts = [turn["value"] for turn in row["conversations"]]
    return AskedCase(
        case,
        str(row.get("style", "standard")),
        tuple(row["asked"]),
        tuple(texts[::2]),
        tuple(texts[1::2]),
        seed_of(seed, "answers"),
    )
