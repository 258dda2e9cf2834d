"""Requests of the OpenAI protocol from prompts, and completions from its answers.

Prompt --messages_of--> messages (text and images as data: URIs)
Sampling --fields_of--> other fields        choices of an answer --completions_of--> Completion

Images go to our servers as the bytes of their files, to others rendered as PNG.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError, GenerationError
from llava.generation.protocol import Completion, Finish, ImageRef, Prompt, Sampling, num_distinct
from llava.generation.remote_facts import ServerFacts
from llava.imaging.decode import decode_image, read_image_bytes
from llava.imaging.dicom.policy import DEFAULT_POLICY
from llava.imaging.geometry import to_rgb
from llava.utils.jsonl import is_unicode

Messages = list[dict[str, Any]]

FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length"}
"""Ends of answers by the value of `finish_reason`."""


@dataclass(frozen=True, slots=True)
class ImageForm:
    """How images are sent.

    Attributes:
        as_files: whether files are sent as they are, as our servers read them.
        window: window of DICOM files; None for that of the server, or the default.
        frame: frame of DICOM files; None for that of the server, or the default.
    """

    as_files: bool
    window: str | None = None
    frame: str | None = None

    def part(self, image: ImageRef) -> dict[str, Any]:
        """Return the part of a message for an image.

        Raises:
            DataError: the file cannot be read or, where it is rendered, decoded.
        """
        return {"type": "image_url", "image_url": self._fields(image)}

    def _fields(self, image: ImageRef) -> dict[str, Any]:
        if isinstance(image, Image.Image):
            return {"url": _data_uri(_png(image if image.mode == "L" else to_rgb(image)), "image/png")}
        data = image if isinstance(image, bytes) else read_image_bytes(image, None)
        if not self.as_files:
            policy = DEFAULT_POLICY.changed(self.window, self.frame)
            shown = decode_image(data if isinstance(image, bytes) else image, dicom=policy).image
            return {"url": _data_uri(_png(to_rgb(shown)), "image/png")}
        fields: dict[str, Any] = {"url": _data_uri(data, "application/octet-stream")}
        fields |= {} if self.window is None else {"window": self.window}
        return fields | ({} if self.frame is None else {"frame": self.frame})


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def messages_of(prompt: Prompt, facts: ServerFacts, form: ImageForm) -> Messages:
    """Return the messages that a server reads as the prompt.

    Raises:
        DataError: the prompt cannot be expressed, or an image cannot be read.
    """
    turns, texts = prompt.conversation.turns, [turn.text for turn in prompt.conversation.turns]
    if prompt.rendered is not None:
        raise DataError("a prompt that is rendered already cannot be sent to a server; pass a conversation")
    roles = [("human", "gpt")[place % 2] for place in range(len(turns))]
    if [turn.role for turn in turns] != roles or not len(turns) % 2:
        raise DataError("a server answers questions only; questions and answers must alternate and end with a question")
    if not all(is_unicode(text) for text in [*texts, prompt.conversation.system or ""]):
        raise DataError("the conversation is not Unicode: it has half of a surrogate pair; remove it")
    num_places = sum(text.count(IMAGE_TOKEN) for text in texts)
    if num_places != len(prompt.images):
        raise DataError(
            f"the conversation has {num_places} {IMAGE_TOKEN} placeholders but {len(prompt.images)} images are given; "
            f"write exactly one {IMAGE_TOKEN} per image"
        )
    images = iter(prompt.images)
    system = prompt.conversation.system
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    kept = () if prompt.history is None else prompt.history.answers
    first_kept = len(turns) - 2 * len(kept)
    for place, turn in enumerate(turns):
        if turn.role == "gpt" and place >= first_kept and facts.is_ours:
            ids = list(kept[(place - first_kept) // 2])
            messages.append({"role": "assistant", "content": "", "token_ids": ids})
        elif turn.role == "gpt":
            if IMAGE_TOKEN in turn.text:
                raise DataError(f"an answer has a placeholder {IMAGE_TOKEN}; images belong to questions")
            messages.append({"role": "assistant", "content": turn.text})
        else:
            messages.append({"role": "user", "content": _content(turn.text, images, facts, form)})
    return messages


def _content(text: str, images: Iterator[ImageRef], facts: ServerFacts, form: ImageForm) -> str | list[dict[str, Any]]:
    """Return the content of a question: its text, or parts."""
    if IMAGE_TOKEN not in text:
        return text
    made = [
        form.part(next(images)) if piece is None else {"type": "text", "text": piece} for piece in _pieces(text, facts)
    ]
    return made


def _pieces(text: str, facts: ServerFacts) -> list[str | None]:
    """Return the texts of a question, None for an image.

    Our servers join them with line breaks and move images to the front where the model was trained so.

    Raises:
        DataError: an image is within a line, where the model reads it there.
    """
    if facts.is_ours and facts.placement == "front":
        rest = text.replace(IMAGE_TOKEN, "").strip()
        return [*[None] * text.count(IMAGE_TOKEN), *([rest] if rest else [])]
    if not facts.is_ours:
        parts = re.split(f"({re.escape(IMAGE_TOKEN)})", text)
        return [None if part == IMAGE_TOKEN else part.strip() for part in parts if part.strip()]
    found: list[str | None] = []
    lines: list[str] = []
    for line in text.split("\n"):
        if line != IMAGE_TOKEN:
            lines.append(line)
            continue
        found += ["\n".join(lines)] if lines else []
        found.append(None)
        lines = []
    found += ["\n".join(lines)] if lines else []
    if any(piece is not None and IMAGE_TOKEN in piece for piece in found):
        raise DataError(
            f"{IMAGE_TOKEN} is within a line, where this model reads it, but a server puts images on lines of their "
            f"own; write a line break before and after {IMAGE_TOKEN}, or answer without --engine"
        )
    return found


def fields_of(sampling: Sampling, facts: ServerFacts) -> dict[str, Any]:
    """Return the fields of a request for one answer; those without effect are left out."""
    is_drawn = sampling.temperature > 0.0
    fields: dict[str, Any] = {
        "model": facts.name,
        "max_tokens": _token_limit(sampling.max_new_tokens, facts),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if is_drawn and sampling.top_p < 1.0 else None,
        "top_k": sampling.top_k or None if is_drawn else None,
        "repetition_penalty": None if sampling.repetition_penalty == 1.0 else sampling.repetition_penalty,
        "seed": sampling.seed if is_drawn else None,
        "stop": list(sampling.stop) or None,
        "logprobs": True if sampling.logprobs else None,
        "top_logprobs": sampling.top_logprobs or None,
        "n": num_distinct(sampling) if num_distinct(sampling) > 1 else None,
        "return_token_ids": True,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _token_limit(limit: int, facts: ServerFacts) -> int | None:
    """Return the token limit of an answer.

    None if only the context limits it: other servers expect the field to be absent.
    """
    if facts.context is None or limit < facts.context:
        return limit
    return facts.context if facts.is_ours else None


def derived_seed(seed: int | None, *parts: int) -> int | None:
    """Return the seed of one of several requests that stand for one; None without a seed."""
    if seed is None:
        return None
    digest = hashlib.sha256("/".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def completions_of(
    reply: Mapping[str, Any], sampling: Sampling, *, is_ours: bool, cuts: Sequence[str] = ()
) -> list[Completion]:
    """Return the completions in the body of an answer, in the order of their index.

    Args:
        reply: the body.
        sampling: what was asked for.
        is_ours: whether the text is used as it is; that of other servers is trimmed.
        cuts: strings at which the text ends, where the server does not stop at them.

    Raises:
        GenerationError: it is not an answer of the protocol, or lacks what was asked for.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(one, dict) for one in choices):
        raise GenerationError("the server's answer has no choices")
    ordered = sorted(choices, key=lambda one: one.get("index") if isinstance(one.get("index"), int) else 0)
    return [_completion(choice, sampling, is_ours=is_ours, cuts=cuts) for choice in ordered]


def _completion(choice: Mapping[str, Any], sampling: Sampling, *, is_ours: bool, cuts: Sequence[str]) -> Completion:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    word = choice.get("finish_reason")
    finish = FINISHES.get(word) if isinstance(word, str) else None
    if finish is None or not isinstance(text, str):
        reason = "the server's answer has no text" if finish else f"the server ended the answer ({_end_of(word)})"
        return Completion("", (), "error", error=reason)
    ids = choice.get("token_ids")
    token_ids = tuple(ids) if isinstance(ids, list) and all(type(one) is int for one in ids) else ()
    entries = _entries(choice) if sampling.logprobs else ()
    if sampling.logprobs and (not entries or (token_ids and len(entries) != len(token_ids))) and (token_ids or text):
        raise GenerationError(
            "the server gives no log-probabilities for the tokens of its answer; ask without logprobs"
        )
    if not is_ours:
        text, is_cut = cut_text(text, cuts)
        finish = "stop" if is_cut else finish
    return Completion(
        text.encode("utf-8", "replace").decode(),  # half a surrogate pair could not be written to a file
        token_ids,
        finish,
        None,
        tuple(_number(entry.get("logprob")) for entry in entries) if sampling.logprobs else None,
        tuple(map(_alternatives, entries)) if sampling.top_logprobs else None,
    )


def piece_of(chunk: Mapping[str, Any]) -> str:
    """Return the new text in a chunk of a stream.

    Raises:
        GenerationError: the answer ended for another reason than a stop or its length.
    """
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    choice = choice if isinstance(choice, dict) else {}
    word, delta = choice.get("finish_reason"), choice.get("delta")
    if word and word not in FINISHES:
        raise GenerationError(f"the server ended the answer ({_end_of(word)})")
    text = delta.get("content") if isinstance(delta, dict) else None
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def cut_text(text: str, cuts: Sequence[str]) -> tuple[str, bool]:
    """Return the stripped text before the first of some stop strings, and whether one was found."""
    found = [place for cut in cuts if (place := text.find(cut)) >= 0]
    return (text[: min(found)] if found else text).strip(), bool(found)


def prompt_ids_of(reply: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the token ids of the prompt that an answer states; empty without."""
    ids = reply.get("prompt_token_ids")
    return tuple(ids) if isinstance(ids, list) and all(type(one) is int for one in ids) else ()


def _entries(choice: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return tuple(one for one in content if isinstance(one, dict)) if isinstance(content, list) else ()


def _alternatives(entry: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    others = entry.get("top_logprobs")
    rows = others if isinstance(others, list) else []
    if not all(isinstance(one, dict) and type(one.get("token_id")) is int for one in rows):
        raise GenerationError("the server gives no ids of likeliest tokens; ask without top_logprobs")
    return tuple((one["token_id"], _number(one.get("logprob"))) for one in rows)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise GenerationError("the server gives a log-probability that is not a number")
    return float(value)


def _end_of(word: Any) -> str:
    is_plain = isinstance(word, str) and bool(re.fullmatch(r"[a-z_]{1,40}", word))
    return f"finish_reason {word}" if is_plain else "no known finish_reason"
