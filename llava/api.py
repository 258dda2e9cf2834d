"""The package in a few lines of Python: load a model, ask it, and score answers.

>>> from llava import api
>>> assistant = api.load(model_folder)
>>> answer = assistant.chat("What does the picture show?", picture, max_new_tokens=8)
>>> score = assistant.score("Is this a blood smear?", "yes", picture)
>>> score.num_tokens >= len("yes") and score.logprob < 0
True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError, GenerationError
from llava.generation.engine import LocalEngine, Score
from llava.generation.protocol import ImageRef, Prompt, Sampling
from llava.model.checkpoint.load import load as load_model
from llava.model.precision import raise_slow_weights
from llava.samples import ROLES, Conversation, Turn, describe

Messages: TypeAlias = str | Sequence[Turn | Mapping[str, str]]
"""A question; or turns, also as `{"role": "user" | "assistant", "content": text}`, a leading `system` one included."""

Images: TypeAlias = "ImageRef | Sequence[ImageRef]"
"""A picture, a path or the bytes of a file; or several."""

__all__ = ["Images", "LlavaPredictor", "Messages", "Score", "load"]


def load(
    path: str | Path,
    *,
    base: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    bits: int = 16,
    **engine: Any,
) -> LlavaPredictor:
    """Open a model that this package saved.

    Args:
        path: folder of a model, an adapter or a projector.
        base: model that an adapter or projector builds on, instead of the recorded one.
        device: `cpu`, `cuda`, ...; the accelerator where there is one when None.
        dtype: of the weights; "auto" keeps the saved one, or takes float32 where a CPU is faster with it.
        bits: 16, or 8 or 4 (bitsandbytes).
        engine: options of `LocalEngine`, such as `max_slots`.

    Raises:
        CheckpointError: the folder holds nothing that can be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(path, base=base, dtype=dtype, device_map=None if device == "cpu" else device, bits=bits)
    if bits == 16:
        torch.nn.Module.to(loaded.model, device)
        if dtype == "auto":
            raise_slow_weights(loaded.model)
    return LlavaPredictor(LocalEngine(loaded.model, loaded.processor, **engine))


class LlavaPredictor:
    """A model to talk to.

    >>> from llava import api
    >>> assistant = api.load(model_folder, max_slots=4)
    >>> "".join(assistant.stream("Which organ?", picture, max_new_tokens=8)) == assistant.chat(
    ...     "Which organ?", picture, max_new_tokens=8
    ... )
    True
    >>> questions = ["Which organ?", "Is it healthy?"]
    >>> answers = assistant.chat_many([(question, picture) for question in questions], max_new_tokens=8)
    >>> answers[0] == assistant.chat(questions[0], picture, max_new_tokens=8)
    True
    """

    def __init__(self, engine: LocalEngine) -> None:
        """Talk through an engine."""
        self.engine = engine

    def chat(self, messages: Messages, images: Images = (), **sampling: Any) -> str:
        """Return the answer to a question or a conversation.

        Args:
            messages: see `Messages`.
            images: pictures in the order of their `<image>` marks; without marks they stand before the first question.
            sampling: fields of `Sampling`; the likeliest answer by default.

        Raises:
            GenerationError: there is no answer; says why.
            DataError: the messages cannot be used.
        """
        [answer] = self.chat_many([(messages, images)], **sampling)
        return answer

    def chat_many(self, requests: Sequence[tuple[Messages, Images]], **sampling: Any) -> list[str]:
        """Return the answers to many conversations, computed together; an image is encoded once for all of them.

        Raises:
            GenerationError: one has no answer; says which and why.
            DataError: the messages of one cannot be used.
        """
        prompts = [_prompt(messages, images) for messages, images in requests]
        answers = []
        for index, [completion, *_] in enumerate(self.engine.generate(prompts, Sampling(**sampling))):
            if completion.error is not None:
                raise GenerationError(f"request {index}: {completion.error}")
            answers.append(completion.text)
        return answers

    def stream(self, messages: Messages, images: Images = (), **sampling: Any) -> Iterator[str]:
        """Yield the pieces of an answer as they come; joined they are what `chat` returns.

        Raises:
            GenerationError: there is no answer; says why.
            DataError: the messages cannot be used.
        """
        shown = ""
        for text in self.engine.stream(_prompt(messages, images), Sampling(**sampling)):
            yield text[len(shown) :]
            shown = text

    def score(self, messages: Messages, answer: str, images: Images = ()) -> Score:
        """Return how likely the model finds an answer to the messages, its end mark included.

        Raises:
            DataError: the messages cannot be used.
        """
        prompt = _prompt(messages, images)
        # Only the answer counts, not what was said before.
        turns = [replace(turn, train=False) for turn in prompt.conversation.turns]
        conversation = Conversation((*turns, Turn("gpt", answer)), prompt.conversation.system)
        return self.engine.score([Prompt(conversation, prompt.images)])[0]


def _prompt(messages: Messages, images: Images) -> Prompt:
    """Put messages and images together, with a mark for every image."""
    shown: tuple[ImageRef, ...]
    shown = tuple(images) if isinstance(images, list | tuple) else (images,)  # type: ignore[assignment]
    system, turns = _turns(messages)
    if not turns or turns[-1].role != "human":
        raise DataError("the last message must be a question from the user")
    num_marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if num_marks == 0 and shown:
        turns[0] = Turn("human", f"{IMAGE_TOKEN}\n" * len(shown) + turns[0].text)
    elif num_marks != len(shown):
        raise DataError(f"{num_marks} {IMAGE_TOKEN} marks for {len(shown)} images; write one for each, or none at all")
    return Prompt(Conversation(tuple(turns), system), shown)


def _turns(messages: Messages) -> tuple[str | None, list[Turn]]:
    """Return system text and turns."""
    if isinstance(messages, str):
        return None, [Turn("human", messages)]
    system, turns = None, []
    for index, message in enumerate(messages):
        if isinstance(message, Turn):
            turns.append(message)
            continue
        role, text = message.get("role"), message.get("content")
        if not isinstance(text, str) or (role not in ROLES and role != "system"):
            expected = "'role' (user, assistant or system) and 'content'"
            raise DataError(f"message {index}: expected {expected}, got {describe(message)}")
        if role == "system" and index == 0:
            system = text
        elif role in ROLES:
            turns.append(Turn(ROLES[role], text))
        else:
            raise DataError(f"message {index}: a system text can only be the first message")
    for index, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[index % 2]:
            raise DataError(f"message {index}: user and assistant must take turns, beginning with the user")
    return system, turns
