"""Paraphrases of answers by a language model, kept only if the extractor reads the same value.

wordings of a split --ChatClient--> replies, stored as they arrive --lines--> checks --> further wordings
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.openai_api import ApiError, ApiFailure, ChatClient, Messages
from llava.symbolic.extract import extract, normalize
from llava.symbolic.hierarchy import plain
from llava.symbolic.structure import Phrases, RuleSet
from llava.utils.json_rows import read_records
from llava.utils.jsonl import append_record, drop_incomplete_line

MAX_LENGTH = 300
"""Maximum length of a paraphrase in characters."""

MARK = re.compile(r"^\s*(?:[-*\u2022]|\(?\d{1,2}[.):])\s+")
"""Bullet or number before a line of a reply."""

SYSTEM = (
    "You rewrite sentences of a medical dialogue. Keep the meaning exactly: do not add, remove or weaken a statement, "
    "and keep every medical term. Write each version on a line of its own, without numbers or comments."
)

Key = tuple[str, str, str]
"""Node, value and wording."""


@dataclass(frozen=True, slots=True)
class ParaphraseCounts:
    """Numbers of requests that were sent, of paraphrases that were kept, and of those that were not."""

    asked: int
    kept: int
    dropped: int


def with_paraphrases(
    rules: RuleSet, *, split: str, number: int, store: Path, client: ChatClient
) -> tuple[RuleSet, ParaphraseCounts]:
    """Return the rules with further wordings of the answers of a split.

    Args:
        rules: rule set with phrases.
        split: split whose answers are paraphrased; wordings of the other one are not accepted.
        number: paraphrases to ask for, for each wording.
        store: file of the replies; what it has is not asked again, so the same file gives the same rules.
        client: client of the endpoint.

    Raises:
        ApiError: a failure that every request shares, such as a wrong key.
        DataError: the rule set has no phrases, or some requests failed; the others are stored.
    """
    phrases = rules.phrases
    if phrases is None:
        raise DataError(f"{rules.path}: the rule set has no phrases to paraphrase")
    wanted = [
        (node, value, text)
        for node, values in phrases.answers.items()
        for value, texts in values.items()
        for text in texts.get(split, ())
    ]
    known = _stored(store, client.settings.deployment, number)
    missing = [key for key in wanted if key not in known]
    known |= dict(_ask(client, missing, number, store))
    if lost := [key for key in wanted if key not in known]:
        raise DataError(f"{len(lost)} of {len(missing)} requests failed; rerun the same command to ask for them again")
    kept: dict[Key, list[str]] = {}
    dropped = 0
    splits = [splits for values in phrases.answers.values() for splits in values.values()]
    taken = {normalize(text) for texts in splits for wordings in texts.values() for text in wordings}
    for key in wanted:
        lines = list(_lines(known[key]))
        kept[key] = [text for text in lines[:number] if _is_faithful(rules, key, text, taken)]
        dropped += len(lines[:number]) - len(kept[key])
    return replace(rules, phrases=_extended(phrases, split, kept)), ParaphraseCounts(
        len(missing), sum(map(len, kept.values())), dropped
    )


def _stored(store: Path, model: str, number: int) -> dict[Key, str]:
    """Return the replies of a file that were asked from this model for this number."""
    if not store.exists():
        return {}
    drop_incomplete_line(store)
    found: dict[Key, str] = {}
    for index, row in enumerate(read_records(store)):
        fields = [row.get(name) for name in ("node", "value", "text", "reply")]
        if not all(isinstance(text, str) for text in fields):
            raise DataError(f"{store}, row {index}: not a stored paraphrase; name another file")
        if (row.get("model"), row.get("number")) == (model, number):
            node, value, text, reply = map(str, fields)
            found[node, value, text] = reply
    return found


def _ask(client: ChatClient, keys: Sequence[Key], number: int, store: Path) -> Iterator[tuple[Key, str]]:
    """Yield the reply to every key, as it is stored; failed ones are left out.

    Raises:
        ApiError: a failure that every request shares.
    """
    for key, reply in zip(keys, client.replies([_messages(key, number) for key in keys]), strict=True):
        if isinstance(reply, ApiFailure):
            if reply.fatal:
                raise ApiError(reply)
            continue
        node, value, text = key
        row = {"node": node, "value": value, "text": text, "number": number, "model": client.settings.deployment}
        append_record(store, {**row, "reply": reply.text})
        yield key, reply.text


def _messages(key: Key, number: int) -> Messages:
    node, value, text = key
    asked = f"{number} other ways" if number > 1 else "another way"
    question = f"The sentence answers a question about {plain(node)!r}; the answer is {plain(value)!r}."
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{question}\nWrite {asked} to say: {text}"},
    ]


def _lines(reply: str) -> Iterator[str]:
    """Yield the sentences of a reply, without bullets, numbers and quotes."""
    for line in reply.splitlines():
        text = MARK.sub("", line).strip().strip('"\u201c\u201d').strip()
        if text:
            yield text


def _is_faithful(rules: RuleSet, key: Key, text: str, taken: set[str]) -> bool:
    """Return whether a paraphrase is new and read as its value with equal certainty; add it to `taken`."""
    node, value, wording = key
    form = normalize(text)
    if len(text) > MAX_LENGTH or form in taken or IMAGE_TOKEN in text or not text.isprintable():
        return False
    read, original = extract(rules.node(node), text), extract(rules.node(node), wording)
    if (read.value, read.hedged) != (value, original.hedged):
        return False
    taken.add(form)
    return True


def _extended(phrases: Phrases, split: str, more: Mapping[Key, Sequence[str]]) -> Phrases:
    """Return the phrases with more answers in a split."""
    answers: dict[str, dict[str, dict[str, Any]]] = {
        node: {value: dict(splits) for value, splits in values.items()} for node, values in phrases.answers.items()
    }
    for (node, value, _), texts in more.items():
        answers[node][value][split] = (*answers[node][value][split], *texts)
    return replace(phrases, answers=answers)
