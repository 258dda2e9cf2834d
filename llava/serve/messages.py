"""Schemas of the requests of both protocols; every field is checked, none is ignored in silence.

body --parse_json--> object --parse_chat--> ChatRequest      (OpenAI protocol)
                            --parse_generate--> RawRequest   (protocol of the original workers)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from llava.constants import IMAGE_TOKEN
from llava.errors import ConfigError
from llava.generation.protocol import UNLIMITED, History, Sampling
from llava.imaging.dicom.policy import DicomPolicy
from llava.samples import Conversation, Turn
from llava.serve.failures import RequestError
from llava.serve.schemas import (
    MAX_MESSAGES,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    TAGS,
    UNKNOWN,
    UNSUPPORTED,
    ChatBody,
    ChatMessage,
    ImageUrl,
    TextPart,
    is_unicode_text,
)

OLD_MAX_NEW_TOKENS = 1024
MAX_PARAM = 120
"""Maximum characters of `param`, since clients choose field names."""

MAX_MARKS = 1 << 18
"""Maximum number of the characters `[`, `{` and `:` in a body, which bounds its lists, objects and names."""

GREEDY_BELOW = 1e-3
"""Temperature of the old protocol below which decoding is greedy."""


@dataclass(frozen=True, slots=True)
class ImageInput:
    """Image of a request.

    Attributes:
        url: URI as sent, or base64 of the old protocol.
        window: window of DICOM files; None for that of the server.
        frame: frame of DICOM files; None for that of the server.
        param: name of the field in messages.
    """

    url: str
    window: str | None = None
    frame: str | None = None
    param: str = "images"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Request of the OpenAI protocol.

    Attributes:
        model: name of the model.
        conversation: the turns, with one `<image>` per image.
        images: images in the order of their placeholders.
        sampling: sampling parameters; `max_new_tokens` is 0 where the request has no limit.
        texts: texts of the client with the names of their fields.
        stream: whether the answer is streamed.
        include_usage: whether a stream ends with a chunk of token counts.
        top_logprobs: number of alternatives of each token.
        return_token_ids: whether token ids are returned.
        history: answers of a dialogue as tokens; None outside of dialogues.
    """

    model: str
    conversation: Conversation
    images: tuple[ImageInput, ...]
    sampling: SamplingFields
    texts: tuple[tuple[str, str], ...]
    stream: bool
    include_usage: bool
    top_logprobs: int
    return_token_ids: bool
    history: History | None = None


@dataclass(frozen=True, slots=True)
class RawRequest:
    """Request of the old protocol: a prompt that is used as it is, with one `<image>` per image."""

    model: str | None
    prompt: str
    images: tuple[ImageInput, ...]
    sampling: SamplingFields


@dataclass(frozen=True, slots=True)
class SamplingFields:
    """Sampling parameters of a request; without a limit of tokens the answer may fill context and memory.

    Attributes:
        max_new_tokens: limit of tokens.
        others: the other parameters, by their names in `Sampling`.
        limit_param: name of the field with the limit.
    """

    max_new_tokens: int | None
    others: Mapping[str, Any]
    limit_param: str = "max_tokens"

    def sampling(self) -> Sampling:
        """Return the parameters for an engine."""
        return Sampling(max_new_tokens=self.max_new_tokens or UNLIMITED, **self.others)


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the object in a body.

    Raises:
        RequestError: the body is not a JSON object, repeats a name within an object, or has too many lists or names.
    """
    # Ten million empty lists take seconds, in which no answer grows. Text and base64 are not slower for this count.
    if sum(map(body.count, (b"[", b"{", b":"))) > MAX_MARKS:
        raise RequestError("invalid_value", f"the body has more than {MAX_MARKS} of the characters [ {{ :")
    try:
        value = json.loads(body, object_pairs_hook=_object_of)
    except (ValueError, RecursionError) as error:
        kind = "nested too deeply" if isinstance(error, RecursionError) else "not JSON in UTF-8"
        raise RequestError("invalid_json", f"the body is {kind}; expected a JSON object") from None
    if not isinstance(value, dict):
        raise RequestError("invalid_json", f"the body is JSON, but of type {type(value).__name__}; expected an object")
    return value


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, whose names differ; Python would keep the last of equal ones."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RequestError("invalid_json", "an object of the body has a name twice; expected each name once")
    return found


def parse_chat(value: Mapping[str, Any]) -> ChatRequest:
    """Return the request in the body of POST /v1/chat/completions.

    Raises:
        RequestError: a field is missing, unknown or wrong; `param` names it.
    """
    try:
        body = ChatBody.model_validate(dict(value))
    except ValidationError as error:
        raise _refusal(error) from None
    conversation, images, texts = _read_messages(body.messages)
    if body.stream_options is not None and not body.stream:
        raise RequestError("invalid_value", "stream_options needs stream: true", param="stream_options")
    _check_logprobs(body)
    return ChatRequest(
        body.model,
        conversation,
        images,
        _sampling_fields(body),
        texts,
        bool(body.stream),
        bool(body.stream_options and body.stream_options.include_usage),
        body.top_logprobs or 0,
        bool(body.return_token_ids),
        _history(body, num_turns=len(conversation.turns)),
    )


def _check_logprobs(body: ChatBody) -> None:
    """Raise `RequestError` for log-probabilities that an engine (`check_dialogue`) would refuse."""
    if body.top_logprobs and not body.logprobs:
        raise RequestError("invalid_value", "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.dialogue is None:
        return
    if body.top_logprobs:
        raise RequestError("invalid_value", "top_logprobs must be 0 with dialogue", param="top_logprobs")
    if body.logprobs and body.repetition_penalty not in (None, 1):
        reason = "repetition_penalty must be 1 with dialogue and logprobs"
        raise RequestError("invalid_value", reason, param="repetition_penalty")


def _refusal(error: ValidationError) -> RequestError:
    """Return the first error of a validation, without the value that was sent."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, where = first["type"], _param(first["loc"])
    if kind in (UNKNOWN, UNSUPPORTED):
        name = first["ctx"]["name"]
        param = (f"{where}.{name}" if where else name)[:MAX_PARAM]
        reason = "is not a known field" if kind == UNKNOWN else "is not supported with this value"
        return RequestError(kind, f"{param} {reason}", param=param)
    if kind == "string_unicode" and where.startswith("messages"):
        return RequestError("invalid_content", f"{where} {first['msg']}", param=where)
    return RequestError("invalid_value", f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=where)


def _param(location: Sequence[int | str]) -> str:
    """Return a path such as `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in TAGS:
            path += f".{part}" if path else part
    return path[:MAX_PARAM]


def _read_messages(
    messages: Sequence[ChatMessage],
) -> tuple[Conversation, tuple[ImageInput, ...], tuple[tuple[str, str], ...]]:
    """Return conversation, images and texts; messages of one role that follow each other become one turn."""
    images: list[ImageInput] = []
    texts: list[tuple[str, str]] = []
    merged: list[tuple[str, list[str]]] = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        role = "system" if message.role == "developer" else message.role
        if role == "system" and merged and merged[-1][0] != "system":
            raise RequestError(
                "invalid_value", f"{where}.role: a system message must be the first", param=f"{where}.role"
            )
        pieces = _pieces(message, f"{where}.content", images, texts)
        if not merged or merged[-1][0] != role:
            merged.append((role, []))
        merged[-1][1].append("\n".join(pieces))
    system = "\n\n".join(merged.pop(0)[1]) if merged[0][0] == "system" else None
    if not merged or merged[0][0] != "user" or merged[-1][0] != "user":
        last = f"messages[{len(messages) - 1}].role"
        raise RequestError(
            "invalid_value", "the first message after a system message and the last one must be the user's", param=last
        )
    roles: dict[str, Literal["human", "gpt"]] = {"user": "human", "assistant": "gpt"}
    turns = tuple(Turn(roles[role], "\n\n".join(parts)) for role, parts in merged)
    return Conversation(turns, system), tuple(images), tuple(texts)


def _history(body: ChatBody, *, num_turns: int) -> History | None:
    """Return the answers that are given as tokens; None outside of dialogues.

    Raises:
        RequestError: they are not the last answers of a dialogue.
    """
    spoken = [(place, one) for place, one in enumerate(body.messages) if one.role in ("user", "assistant")]
    answers: list[tuple[int, ...]] = []
    for place, message in spoken:
        param = f"messages[{place}].token_ids"
        if message.token_ids is None:
            if answers and message.role == "assistant":
                raise RequestError("invalid_value", f"{param} is missing, but an earlier answer has it", param=param)
            continue
        if body.dialogue is None or message.role != "assistant" or message.content != "":
            reason = "belongs to answers in a request with dialogue, whose content is empty"
            raise RequestError("invalid_value", f"{param} {reason}", param=param)
        answers.append(tuple(message.token_ids))
    if answers and (body.n or 1) > 1:
        raise RequestError("invalid_value", "n must be 1 in a dialogue that has answers", param="n")
    if answers and len(spoken) != num_turns:
        raise RequestError("invalid_value", "messages with token_ids must alternate", param="messages")
    return None if body.dialogue is None else History(tuple(answers), body.dialogue.sample or 0)


def _pieces(message: ChatMessage, where: str, images: list[ImageInput], texts: list[tuple[str, str]]) -> list[str]:
    """Return the texts of a message, `<image>` for an image; append to `images` and `texts`."""
    if isinstance(message.content, str):
        texts.append((where, message.content))
        return [message.content]
    pieces = []
    for number, part in enumerate(message.content):
        param = f"{where}[{number}]"
        if isinstance(part, TextPart):
            texts.append((f"{param}.text", part.text))
            pieces.append(part.text)
            continue
        if message.role != "user":
            raise RequestError("invalid_value", f"{param}: images belong to messages of the user", param=param)
        images.append(_image_input(part.image_url, f"{param}.image_url"))
        pieces.append(IMAGE_TOKEN)
    return pieces


def _image_input(image: ImageUrl, param: str) -> ImageInput:
    frame = None if image.frame is None else str(image.frame)
    for name, policy in (("window", {"window": image.window}), ("frame", {"frame": frame})):
        try:
            DicomPolicy(**{key: value for key, value in policy.items() if value is not None})
        except ConfigError:
            known = "see --dicom-window" if name == "window" else "expected first, middle or a number from 0"
            raise RequestError(
                "invalid_value", f"{param}.{name} is unknown; {known}", param=f"{param}.{name}"
            ) from None
    return ImageInput(image.url, image.window, frame, f"{param}.url")


def _sampling_fields(body: ChatBody) -> SamplingFields:
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise RequestError(
            "invalid_value", "max_tokens and max_completion_tokens differ; send one", param="max_completion_tokens"
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    others: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "repetition_penalty": body.repetition_penalty,
        "n": body.n,
        "seed": body.seed,
        "logprobs": body.logprobs,
    }
    return SamplingFields(
        body.max_completion_tokens or body.max_tokens,
        {name: value for name, value in others.items() if value is not None} | {"stop": _stops(stop)},
        "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    )


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    if not all(stops):
        raise RequestError("invalid_value", "stop holds an empty string", param="stop")
    return tuple(dict.fromkeys(stops))


Check: TypeAlias = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_stop(value: Any) -> bool:
    return is_unicode_text(value) and len(value) <= MAX_STOP_CHARACTERS


def _is_texts(value: Any, limit: int) -> bool:
    return isinstance(value, list) and len(value) <= limit and all(is_unicode_text(one) for one in value)


OLD_FIELDS: dict[str, tuple[Check, str]] = {
    "model": (is_unicode_text, "a string"),
    "prompt": (is_unicode_text, "Unicode text"),
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "max_new_tokens": (lambda value: type(value) is int and value >= 1, "an integer of at least 1"),
    "stop": (
        lambda value: _is_stop(value) or (_is_texts(value, MAX_STOPS) and all(map(_is_stop, value))),
        f"a string or a list of at most {MAX_STOPS} strings, each of at most {MAX_STOP_CHARACTERS} characters",
    ),
    "images": (lambda value: _is_texts(value, MAX_MESSAGES), f"a list of at most {MAX_MESSAGES} base64 strings"),
}
"""Fields of the old protocol, with their checks; null counts as absent, and other fields never had an effect."""


def parse_generate(value: Mapping[str, Any]) -> RawRequest:
    """Return the request in the body of POST /worker_generate_stream.

    Raises:
        RequestError: a field is missing or wrong.
    """
    fields = {name: value[name] for name in OLD_FIELDS if value.get(name) is not None}
    for name, field in fields.items():
        check, expected = OLD_FIELDS[name]
        if not check(field):
            raise RequestError("invalid_value", f"{name} must be {expected}", param=name)
    if "prompt" not in fields:
        raise RequestError("invalid_value", "prompt is missing", param="prompt")
    temperature = float(fields.get("temperature", 1.0))
    stop = fields.get("stop") or []
    others = {
        "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
        "top_p": float(fields.get("top_p", 1.0)),
        "stop": tuple(dict.fromkeys(text for text in ([stop] if isinstance(stop, str) else stop) if text)),
    }
    limit = min(fields.get("max_new_tokens", 256), OLD_MAX_NEW_TOKENS)
    images = tuple(ImageInput(url, param=f"images[{place}]") for place, url in enumerate(fields.get("images", [])))
    return RawRequest(fields.get("model"), fields["prompt"], images, SamplingFields(limit, others))
