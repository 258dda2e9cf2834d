"""Python API: load a model, chat with it, and score answers.

>>> from llava import api
>>> assistant = api.load_predictor(model_folder)
>>> answer = assistant.chat("What does the image show?", image, max_new_tokens=8)
>>> score = assistant.score("Is this a blood smear?", "yes", image)
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
from llava.generation.engine import LocalEngine, SequenceScore
from llava.generation.loading import load_for_inference
from llava.generation.protocol import ImageRef, Prompt, Sampling
from llava.samples import ROLES, Conversation, Turn, type_and_length

Messages: TypeAlias = str | Sequence[Turn | Mapping[str, str]]
"""A question, or turns, also as `{"role": "user" | "assistant", "content": text}`; the first may be `system`."""

Images: TypeAlias = "ImageRef | Sequence[ImageRef]"
"""An image, the path or the bytes of an image file; or several of these."""

__all__ = ["Images", "LlavaPredictor", "Messages", "SequenceScore", "load_predictor"]


def load_predictor(
    path: str | Path,
    *,
    base: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    bits: int = 16,
    **engine: Any,
) -> LlavaPredictor:
    """Load a llava checkpoint for inference.

    Args:
        path: folder of a model, an adapter or a projector.
        base: base model of an adapter or projector, instead of the recorded one.
        device: `cpu`, `cuda`, ...; None for the GPU if available, else the CPU.
        dtype: data type of the weights; "auto" keeps the saved one, or uses float32 where a CPU is faster with it.
        bits: 16, or 8 or 4 (bitsandbytes).
        engine: options of `LocalEngine`, such as `max_slots`.

    Raises:
        CheckpointError: the folder is not a checkpoint, cannot be loaded, or holds weights that are not finite.
    """
    loaded = load_for_inference(path, base=base, dtype=dtype, device=device, bits=bits)
    return LlavaPredictor(LocalEngine(loaded.model, loaded.processor, **engine))


class LlavaPredictor:
    """Loaded model with methods to chat and to score answers.

    >>> from llava import api
    >>> assistant = api.load_predictor(model_folder, max_slots=4)
    >>> "".join(assistant.stream("Which organ?", image, max_new_tokens=8)) == assistant.chat(
    ...     "Which organ?", image, max_new_tokens=8
    ... )
    True
    >>> questions = ["Which organ?", "Is it healthy?"]
    >>> answers = assistant.chat_many([(question, image) for question in questions], max_new_tokens=8)
    >>> answers[0] == assistant.chat(questions[0], image, max_new_tokens=8)
    True
    """

    def __init__(self, engine: LocalEngine) -> None:
        """Create a predictor that uses an engine for all requests."""
        self.engine = engine

    def chat(self, messages: Messages, images: Images = (), **sampling: Any) -> str:
        """Return the answer to a question or a conversation.

        Args:
            messages: see `Messages`.
            images: images in the order of their `<image>` placeholders; without placeholders they precede the first
                question.
            sampling: fields of `Sampling`; greedy decoding by default.

        Raises:
            GenerationError: no answer could be generated; states the reason.
            DataError: the messages are invalid.
        """
        [answer] = self.chat_many([(messages, images)], **sampling)
        return answer

    def chat_many(self, requests: Sequence[tuple[Messages, Images]], **sampling: Any) -> list[str]:
        """Return the answers to many conversations in one batch; an image is encoded once for all of them.

        Raises:
            GenerationError: a request has no answer; names the request and the reason.
            DataError: the messages of a request are invalid.
        """
        prompts = [_prompt(messages, images) for messages, images in requests]
        answers = []
        for index, [completion, *_] in enumerate(self.engine.generate(prompts, Sampling(**sampling))):
            if completion.error is not None:
                raise GenerationError(f"request {index}: {completion.error}")
            answers.append(completion.text)
        return answers

    def stream(self, messages: Messages, images: Images = (), **sampling: Any) -> Iterator[str]:
        """Yield parts of an answer while it is generated; joined, they equal the answer of `chat`.

        Raises:
            GenerationError: no answer could be generated; states the reason.
            DataError: the messages are invalid.
        """
        shown = ""
        for text in self.engine.stream(_prompt(messages, images), Sampling(**sampling)):
            yield text[len(shown) :]
            shown = text

    def score(self, messages: Messages, answer: str, images: Images = ()) -> SequenceScore:
        """Return the log-probability of an answer to the messages, including its end-of-text token.

        Raises:
            DataError: the messages are invalid.
        """
        prompt = _prompt(messages, images)
        # Earlier answers do not count.
        turns = [replace(turn, train=False) for turn in prompt.conversation.turns]
        conversation = Conversation((*turns, Turn("gpt", answer)), prompt.conversation.system)
        return self.engine.score([Prompt(conversation, prompt.images)])[0]


def _prompt(messages: Messages, images: Images) -> Prompt:
    """Return the prompt of messages and images, with one placeholder per image."""
    shown: tuple[ImageRef, ...]
    shown = tuple(images) if isinstance(images, list | tuple) else (images,)  # type: ignore[assignment]
    system, turns = _turns(messages)
    if not turns or turns[-1].role != "human":
        raise DataError("the last message is not from the user; expected a question")
    num_placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if num_placeholders == 0 and shown:
        turns[0] = Turn("human", f"{IMAGE_TOKEN}\n" * len(shown) + turns[0].text)
    elif num_placeholders != len(shown):
        raise DataError(
            f"{num_placeholders} {IMAGE_TOKEN} placeholders for {len(shown)} images; expected one per image, or none"
        )
    return Prompt(Conversation(tuple(turns), system), shown)


def _turns(messages: Messages) -> tuple[str | None, list[Turn]]:
    """Return the system prompt and the turns."""
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
            raise DataError(f"message {index}: expected {expected}, got {type_and_length(message)}")
        if role == "system" and index == 0:
            system = text
        elif role in ROLES:
            turns.append(Turn(ROLES[role], text))
        else:
            raise DataError(f"message {index}: got role 'system'; expected it only in the first message")
    for index, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[index % 2]:
            raise DataError(
                f"message {index}: role is {turn.role!r}; expected user and assistant to alternate, user first"
            )
    return system, turns
