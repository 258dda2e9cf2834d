"""What a language model is asked for: a dialogue about a picture that it knows from text only.

    caption row  --context_text-->  text
    system text + eight worked examples + the row's text  --messages_for-->  one conversation of the protocol

Layout of both texts: LLaVA-Med 1.0. Its wording is not used; `SYSTEM_TEXT` and the examples were written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.errors import DataError
from llava.instruct.instruct_few_shot_examples import FEW_SHOT_EXAMPLES
from llava.samples import describe

USER, ASSISTANT = "User:", "Assistant:"
"""How the speakers are marked in a written dialogue."""

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


def mentions_of(row: Mapping[str, Any]) -> list[str]:
    """Return the sentences of the article that refer to the figure, from a list of texts or of objects with `tokens`.

    Raises:
        DataError: the field is something else.
    """
    raw = row.get("in_text_mention")
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise DataError(f"field 'in_text_mention' must be a list or null, got {describe(raw)}")
    mentions = [item.get("tokens") if isinstance(item, Mapping) else item for item in raw]
    if not all(isinstance(mention, str) for mention in mentions):
        raise DataError("field 'in_text_mention' must hold texts, or objects whose field 'tokens' is a text")
    return [mention for mention in mentions if isinstance(mention, str)]


def context_text(row: Mapping[str, Any], *, use_inline_mentions: bool) -> str:
    """Return what the model is told of a figure.

    Args:
        row: a caption row (llava-med.md 3.3).
        use_inline_mentions: also tell the sentences that refer to it.

    Raises:
        DataError: the row has no caption, or a field of the wrong type.
    """
    caption, label = row.get("fig_caption"), row.get("fig_label")
    if not isinstance(caption, str):
        raise DataError(f"field 'fig_caption' must be a text, got {describe(caption)}")
    text = f"Figure Caption:\n{label}: {caption}" if label else f"Figure Caption:\n{caption}"
    mentions = mentions_of(row) if use_inline_mentions else []
    return text + ("\n\nFigure Context:" + "".join(f"\n\t- {mention}" for mention in mentions) if mentions else "")


def dialogue_text(turns: Sequence[Mapping[str, str]]) -> str:
    """Return turns (`from`, `value`) as the written dialogue that the model is to produce."""
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
