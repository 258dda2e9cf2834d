"""Conversations of a rule set: table rows in several orders, with wrong hints, or as given.

row of a table --labels--> truth --orders, hints, wordings of the test--> RuleDialogue, ...
row of `llava rules dialogues` ------------------------------------------> RuleDialogue
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import ConfigError, DataError
from llava.eval.questions import check_unique
from llava.symbolic.dialogues import CLINICIAN, Wordings, ordered_nodes, question_and_answer, wordings_of
from llava.symbolic.labels import assign
from llava.symbolic.structure import Assignment, RuleSet

STYLES = ("standard", "diagnosis_first", "shuffled", "improvised")
"""Orders that a table's rows are asked in, unless the rule file or an option names others."""

HINTS = ("hint_wrong", "disagree")
"""Wrong statements before each question: about the node before it, or about its own node."""


@dataclass(frozen=True, slots=True)
class RuleDialogue:
    """Conversation to be held.

    Attributes:
        id: its name.
        case: name of the case, shared by all conversations about it.
        image: name of the image.
        group: patient, or the image; intervals resample groups.
        truth: true values of the nodes.
        asked: T nodes in the asked order.
        style: name of the order.
        hint: wrong statements that all questions have before them; empty for none.
        contexts: statement before each question, one of `read_settings.CONTEXTS`, or `unknown`.
        questions: T questions, the first with the image.
    """

    id: str
    case: str
    image: str
    group: str
    truth: Assignment
    asked: tuple[str, ...]
    style: str
    hint: str
    contexts: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CasePlan:
    """Settings for asking about the rows of a table.

    Attributes:
        styles: orders of the questions; `single` asks every question alone.
        hints: wrong statements, in the usual order.
        split: wordings.
        seed: seed of orders, wordings and statements.
    """

    styles: Sequence[str] = STYLES
    hints: Sequence[str] = HINTS
    split: str = "test"
    seed: int = 0


def read_dialogues(
    rules: RuleSet, rows: Iterable[Mapping[str, Any]], plan: CasePlan, *, source: str = "rows"
) -> list[RuleDialogue]:
    """Return the conversations of rows; those with `asked` are asked as they are.

    Raises:
        DataError: a row cannot be used (names the row), or no question is left.
    """
    found: list[RuleDialogue] = []
    for index, row in enumerate(rows):
        try:
            found += [_given(rules, row, index)] if "asked" in row else list(_planned(rules, row, index, plan))
        except DataError as error:
            raise DataError(f"{source}, row {index}: {error}") from None
    if not found:
        raise DataError(f"{source}: no row has a question to ask")
    check_unique([dialogue.id for dialogue in found], source)
    return found


def _image_of(row: Mapping[str, Any]) -> str:
    image = row.get("image")
    if not isinstance(image, str) or not image:
        raise DataError("key 'image': expected the name of an image")
    return image


def _group_of(rules: RuleSet, row: Mapping[str, Any], image: str) -> str:
    group = row.get("group", row.get(rules.evaluation.get("groups", "patient")))
    return image if group in (None, "") else str(group)


def _given(rules: RuleSet, row: Mapping[str, Any], index: int) -> RuleDialogue:
    """Return the conversation of a row of `llava rules dialogues`, whose answers the model is not shown."""
    image, asked, truth = _image_of(row), row["asked"], row.get("truth")
    if not isinstance(asked, list) or not asked or not isinstance(truth, Mapping):
        raise DataError("expected a list 'asked' of nodes and an object 'truth' of values")
    unknown = [str(id)[:80] for id in asked if not isinstance(id, str) or id not in rules.by_id]
    if unknown or len(set(map(str, asked))) < len(asked):
        raise DataError(f"'asked' has a repeated or unknown node {unknown[:1]}; known: {', '.join(rules.by_id)}")
    missing = [id for id in asked if truth.get(id) not in rules.node(id).values]
    if missing:
        raise DataError(f"'truth' has no value of {missing[0]}; known: {', '.join(rules.node(missing[0]).values)}")
    turns = row.get("conversations")
    said = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    questions = [turn.get("value") for turn in said if turn.get("from") in ("human", "user")]
    if len(questions) != len(asked) or not all(isinstance(text, str) for text in questions):
        raise DataError(f"expected one question for each of {len(asked)} asked nodes, got {len(questions)}")
    texts = [str(text).replace(IMAGE_TOKEN, "").strip() for text in questions]
    first = str(questions[0]) if IMAGE_TOKEN in str(questions[0]) else f"{IMAGE_TOKEN}\n{texts[0]}"
    stated = row.get("contexts")
    plain = tuple("unknown" if text.startswith(CLINICIAN) else "none" for text in texts)
    contexts = tuple(map(str, stated)) if isinstance(stated, list) and len(stated) == len(asked) else plain
    known = {node.id: str(truth[node.id]) for node in rules.nodes if truth.get(node.id) in node.values}
    return RuleDialogue(
        id=str(row.get("id", index)),
        case=image,
        image=image,
        group=_group_of(rules, row, image),
        truth=known,
        asked=tuple(asked),
        style=str(row.get("style", "given")),
        hint="",
        contexts=contexts,
        questions=(first, *texts[1:]),
    )


def _planned(rules: RuleSet, row: Mapping[str, Any], index: int, plan: CasePlan) -> Iterator[RuleDialogue]:
    """Yield the conversations about the row of a table: one of each style, then one of each hint."""
    phrases = wordings_of(rules, plan.split)
    image = _image_of(row)
    truth = assign(rules, row)
    if broken := rules.violations(truth):
        raise DataError(f"its assignment breaks {', '.join(broken)}")
    case, group = str(row.get("id", index)), _group_of(rules, row, image)
    wordings, source = Wordings(rules, phrases, plan.split), f"{plan.seed}/{plan.split}/{case}"
    for style, hint in [*((style, "") for style in plan.styles), *(("standard", hint) for hint in plan.hints)]:
        name = hint or style
        order = ordered_nodes(rules, style, truth, random.Random(f"{plan.seed}/{case}/{style}"))
        orders = [[id] for id in rules.asked(truth)] if style == "single" else [order] if order else []
        for asked in orders:
            questions = [_question(wordings, truth, id, hint=hint, source=source) for id in asked]
            yield RuleDialogue(
                id=f"{case}/{name}/{asked[0]}" if style == "single" else f"{case}/{name}",
                case=case,
                image=image,
                group=group,
                truth=truth,
                asked=tuple(asked),
                style=style,
                hint=hint,
                contexts=tuple(hint if text.startswith(CLINICIAN) else "none" for text in questions),
                questions=(f"{IMAGE_TOKEN}\n{questions[0]}", *questions[1:]),
            )


def _question(wordings: Wordings, truth: Assignment, id: str, *, hint: str, source: str) -> str:
    """Return the question about a node, in the same words for all conversations of one `source`."""
    draw = random.Random(f"{source}/{id}")
    return question_and_answer(wordings, truth, id, hint or "none", draw)[0]


def names_of(text: str | None, known: Sequence[str], option: str) -> tuple[str, ...] | None:
    """Return the names of an option, separated by commas; None without the option, none for `none`.

    Raises:
        ConfigError: a name is unknown.
    """
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(",") if part.strip() and part.strip() != "none")
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: unknown {name!r}; known: {', '.join(known)}")
    return tuple(dict.fromkeys(names))
