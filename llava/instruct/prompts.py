"""Prompts to generate dialogues about figures, which the language model knows only as text.

    caption row  --context_text-->  text
    system text + eight few-shot examples + the row's text  --messages_for-->  one conversation of the protocol

The layout of both texts is that of LLaVA-Med 1.0; `SYSTEM_TEXT` and the examples were written for this project.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.instruct.instruct_few_shot_examples import FEW_SHOT_EXAMPLES
from llava.samples import type_and_length
from llava.utils.json_rows import read_records
from llava.utils.jsonl import read_text

USER, ASSISTANT = "User:", "Assistant:"
"""Marks of the speakers in a dialogue."""

SYSTEM_TEXT = """\
You are a careful assistant with knowledge of biology and medicine. You are given the caption of a figure from a \
biomedical article, and sometimes sentences of the article that refer to it. You do not get the figure itself.

Write a dialogue between a person (User) and an assistant (Assistant) about the figure, as if both of them were \
looking at it and neither had any text.

Rules:
- Talk about what can be seen. Use the text to know what is in the figure, but do not repeat its particular facts: \
no numbers, dates, names, abbreviations or terms that could not be told from looking.
- Never point at the text. The words "caption", "context", "description", "mentioned", "text" and "article" must not \
occur.
- Let the User ask different kinds of questions that a look at the figure can answer: what kind of picture it is, \
what is shown, where it is, how it looks, what stands out, what it may mean. The questions should not give away the \
answers.
- Write two turns or more for each speaker, three where the text allows it.
- Let the Assistant answer in plain, complete sentences and with caution. It gives no medical advice; where a \
decision is needed, it refers to a professional.
- Begin every question with "User:" and every answer with "Assistant:", and separate them by an empty line."""
"""System message. The generated data depend on this text and on the examples."""


def mentions_of(row: Mapping[str, Any]) -> list[str]:
    """Return the sentences that mention the figure, which are stored as texts or as objects with `tokens`.

    Raises:
        DataError: `in_text_mention` is not a list of these.
    """
    raw = row.get("in_text_mention")
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise DataError(f"field 'in_text_mention' must be a list or null, got {type_and_length(raw)}")
    mentions = [item.get("tokens") if isinstance(item, Mapping) else item for item in raw]
    if not all(isinstance(mention, str) for mention in mentions):
        raise DataError("field 'in_text_mention' must contain texts, or objects whose field 'tokens' is text")
    return [mention for mention in mentions if isinstance(mention, str)]


def context_text(row: Mapping[str, Any], *, use_inline_mentions: bool) -> str:
    """Return the description of a figure for the model.

    Args:
        row: a caption row with `fig_caption`, `fig_label` and `in_text_mention`.
        use_inline_mentions: include the sentences that mention the figure.

    Raises:
        DataError: the row has no caption, or a field of the wrong type.
    """
    caption, label = row.get("fig_caption"), row.get("fig_label")
    if not isinstance(caption, str):
        raise DataError(f"field 'fig_caption' must be text, got {type_and_length(caption)}")
    text = f"Figure Caption:\n{label}: {caption}" if label else f"Figure Caption:\n{caption}"
    mentions = mentions_of(row) if use_inline_mentions else []
    return text + ("\n\nFigure Context:" + "".join(f"\n\t- {mention}" for mention in mentions) if mentions else "")


def dialogue_text(turns: Sequence[Mapping[str, str]]) -> str:
    """Return turns (`from`, `value`) as a dialogue in the format that the model has to write."""
    return "\n\n".join(f"{USER if turn['from'] == 'human' else ASSISTANT} {turn['value']}" for turn in turns)


def messages_for(row: Mapping[str, Any], *, use_inline_mentions: bool) -> list[dict[str, str]]:
    """Return the request for one figure.

    Raises:
        DataError: see `context_text`.
    """
    query = context_text(row, use_inline_mentions=use_inline_mentions)
    messages = [{"role": "system", "content": SYSTEM_TEXT}]
    for example in FEW_SHOT_EXAMPLES:
        shown = context_text(example, use_inline_mentions=use_inline_mentions)
        messages.append({"role": "user", "content": shown})
        messages.append({"role": "assistant", "content": dialogue_text(example["conversations"])})
    return [*messages, {"role": "user", "content": query}]


logger = logging.getLogger(__name__)

CaptionRow = dict[str, Any]


def read_captions(path: str | Path, *, max_size: int | None = None, skip_bad: bool = False) -> list[CaptionRow]:
    """Return the caption rows of a file, each `pair_id` once.

    Args:
        path: JSON array, JSON lines, or an object with one list per domain; the content decides.
        max_size: maximum number of rows.
        skip_bad: leave out invalid rows with one warning, instead of raising an error.

    Raises:
        DataError: the file cannot be read, or a row is invalid; the message names file, domain and row.
    """
    rows: dict[str, CaptionRow] = {}
    num_bad = num_repeated = 0
    for where, row in _placed_rows(path):
        if max_size is not None and len(rows) >= max_size:
            break
        try:
            identity = _check(row)
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{path}, {where}: {error}; pass --skip-bad to leave out such rows") from None
            num_bad += 1
            continue
        num_repeated += identity in rows
        rows.setdefault(identity, row)
    if num_bad or num_repeated:
        logger.warning("%s: left out %d invalid and %d repeated rows", path, num_bad, num_repeated)
    if not rows:
        raise DataError(f"{path}: the file has no valid caption row")
    return list(rows.values())


def _check(row: Any) -> str:
    """Return the id of a row after checking the row.

    Raises:
        DataError: the row is invalid.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, got {type(row).__name__}")
    identity = row.get("pair_id")
    if not isinstance(identity, str) or not identity:
        raise DataError("field 'pair_id' must be non-empty text")
    context_text(row, use_inline_mentions=True)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise DataError("the row contains a lone surrogate or is nested too deeply, and cannot be written") from None
    return identity


def _placed_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield every row with its location for messages."""
    text = read_text(path)
    domains = _domains(text, path)
    if domains is None:
        for index, record in enumerate(read_records(path)):
            yield f"row {index}", record
        return
    del text
    columns = [[(f"{domain!r}, row {index}", row) for index, row in enumerate(rows)] for domain, rows in domains]
    yield from (cell for line in zip_longest(*columns) for cell in line if cell is not None)


def _domains(text: str, path: str | Path) -> Iterable[tuple[str, list[Any]]] | None:
    """Return the lists of a JSON object of lists; None if the text is not such an object."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None  # JSON lines, or an error that the reader of lines reports
    if "pair_id" in value:
        return None
    wrong = [name for name, rows in value.items() if not isinstance(rows, list)]
    if wrong:
        raise DataError(f"{path}: {wrong[0]!r} is not a list; expected an object with one list per domain")
    return list(value.items())
