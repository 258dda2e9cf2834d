"""Tokens of a growing dialogue: answers are kept as their ids, questions use the template's tokens.

prompt --with_answer--> + ids of the answer --with_question--> + end token if it lacks one, question, header --> ...
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded, encode_prompt, follow_up
from llava.errors import DataError, PromptTooLongError
from llava.generation.protocol import History, Prompt
from llava.imaging.anyres import Size
from llava.processing import LlavaMedProcessor

FollowUp: TypeAlias = Sequence[tuple[int, int]]
"""End token, question and answer header as `encode.follow_up` gives them."""


def with_answer(encoded: Encoded, answer: tuple[int, ...]) -> Encoded:
    """Return a dialogue that ends with an answer header, with the answer; its tokens are labeled."""
    return _extended(encoded, answer, answer, (encoded.turns[-1],) * len(answer))


def with_question(encoded: Encoded, rest: FollowUp, *, ends: Collection[int]) -> Encoded:
    """Return a dialogue that ends with an answer, with the next question.

    Args:
        encoded: the dialogue.
        rest: what follows the answer.
        ends: ids of tokens that end answers; one of them is not added to an answer that has it.
    """
    turn = encoded.turns[-1]
    kept = rest[1:] if encoded.input_ids[-1] in ends else rest
    ids = tuple(token for token, _ in kept)
    return _extended(encoded, ids, (IGNORE_INDEX,) * len(ids), tuple(turn + after for _, after in kept))


def encode_held(
    prompt: Prompt,
    processor: LlavaMedProcessor,
    *,
    images: Sequence[str],
    sizes: Sequence[Size] | None,
    ends: Collection[int],
) -> Encoded:
    """Return the prompt of a conversation whose last answers are token ids.

    Args:
        prompt: the prompt, with a history.
        processor: processor of the model.
        images: key of each image.
        sizes: width and height of each image, where they are needed.
        ends: ids of tokens that end answers.

    Raises:
        ConfigError: answers of the template do not end with a token of their own.
        DataError: the history does not belong to the conversation, or a question cannot be read.
    """
    history, turns = prompt.history or History(), prompt.conversation.turns
    start = len(turns) - 2 * len(history.answers)
    if start < 1 or any(turn.role != ("gpt", "human")[place % 2] for place, turn in enumerate(turns[start:])):
        raise DataError(
            f"{len(history.answers)} answers are given as tokens, but the conversation does not end with them"
        )
    opening = replace(prompt.conversation, turns=turns[:start])
    encoded = encode_prompt(opening, processor, images=images, sizes=sizes)
    for answer, question in zip(history.answers, turns[start + 1 :: 2], strict=True):
        encoded = with_question(with_answer(encoded, answer), follow_up(question.text, processor), ends=ends)
    return encoded


def check_history(history: History, model: Any, *, never: Collection[int], max_tokens: int) -> None:
    """Check answers that a client sends as tokens.

    Args:
        history: the answers.
        model: the model that is said to have written them.
        never: ids that it never writes.
        max_tokens: its context.

    Raises:
        PromptTooLongError: they are longer than the context.
        DataError: an answer has no token, or one that the model cannot have written.
    """
    if history.num_tokens >= max_tokens:
        raise PromptTooLongError(
            f"the answers so far have {history.num_tokens} tokens, but at most {max_tokens - 1} fit the model; shorten "
            "the conversation"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for number, answer in enumerate(history.answers):
        if not answer or any(not 0 <= token < vocabulary or token in never for token in answer):
            raise DataError(
                f"answer {number} has no tokens, or one that this model cannot generate; send the ids it returned"
            )


def _extended(encoded: Encoded, ids: tuple[int, ...], labels: tuple[int, ...], turns: tuple[int, ...]) -> Encoded:
    return replace(
        encoded,
        input_ids=encoded.input_ids + ids,
        labels=encoded.labels + labels,
        turns=encoded.turns + turns,
    )
