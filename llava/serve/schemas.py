"""Schemas of the OpenAI protocol: strict types, unknown fields refused, no value converted.

Importing this module needs the extra `serve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llava.utils.jsonl import is_unicode

MAX_ANSWERS, MAX_STOPS, MAX_TOP_LOGPROBS, MAX_TOKEN_IDS = 16, 16, 20, 1 << 17
"""Largest values of `n` and `top_logprobs`, and largest numbers of stop strings and of token ids of a message."""

MAX_STOP_CHARACTERS = 1000
"""Largest length of a stop string: each event of an answer is compared with all of them."""

MAX_MESSAGES, MAX_METADATA = 4096, 64
"""Largest number of messages, of parts of a message, and of entries of `metadata`: a body may hold a million."""

AS_TEXT, AS_NUMBER, AS_PARTS = "<text>", "<number>", "<parts>"
AS_TEXT_PART, AS_IMAGE_PART = "<text part>", "<image part>"
TAGS = (AS_TEXT, AS_NUMBER, AS_PARTS, AS_TEXT_PART, AS_IMAGE_PART)
"""Tags of alternatives; the location of an error lists those that were taken."""

UNKNOWN: Final = "unknown_parameter"
UNSUPPORTED: Final = "unsupported_parameter"
"""Types of the errors of fields; `name` in their context names the field."""

Neutral = Mapping[str, tuple[Any, ...]]


NEUTRAL: Neutral = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": (),
    "moderation": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "min_p": (0,),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
}
"""Fields that other servers know, with their values without effect; these and null are accepted, others refused."""

NEUTRAL_OF_MESSAGES: Neutral = {
    "name": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "reasoning_content": (),
}
"""The same for fields of a message, such as those of an answer that a client sends back."""

NEUTRAL_OF_PARTS: Neutral = {"prompt_cache_breakpoint": ()}
NEUTRAL_OF_STREAMS: Neutral = {"include_obfuscation": (False,)}
"""The same for parts of a message and for `stream_options`."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    neutral: ClassVar[Neutral] = {}
    """Fields without effect here, with their values that are accepted in addition to null."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Return the fields that have an effect; the first one that is unknown or not supported is refused."""
        # `extra="forbid"` alone collects an error of 1 kB for each unknown name, and a body has room for a million.
        if not isinstance(value, dict) or value.keys() <= cls.model_fields.keys():
            return value
        for name, field in value.items():
            if name not in cls.model_fields and not _is_neutral(field, cls.neutral.get(name)):
                # The library cannot show a name that has unpaired surrogates.
                shown = {"name": name.encode(errors="replace").decode()}
                raise PydanticCustomError(UNSUPPORTED if name in cls.neutral else UNKNOWN, "refused", shown)
        return {name: field for name, field in value.items() if name in cls.model_fields}


def _is_neutral(value: Any, neutral: tuple[Any, ...] | None) -> bool:
    """Return whether a field is null or has one of these values; None: the field is not known."""
    if neutral is None:
        return False
    return value is None or any(value == one and type(value) in _alike(one) for one in neutral)


def _alike(value: Any) -> tuple[type, ...]:
    return (int, float) if isinstance(value, int) and not isinstance(value, bool) else (type(value),)


def is_unicode_text(value: Any) -> bool:
    """Return whether a value is a string without unpaired surrogates, which no tokenizer accepts."""
    return isinstance(value, str) and (value.isascii() or is_unicode(value))


def _checked_text(value: str) -> str:
    if not is_unicode_text(value):
        raise PydanticCustomError("string_unicode", "has an unpaired surrogate; expected Unicode text")
    return value


Text = Annotated[str, AfterValidator(_checked_text)]


def _kind_of_content(value: Any) -> str:
    return AS_PARTS if isinstance(value, list) else AS_TEXT


def _kind_of_frame(value: Any) -> str:
    return AS_TEXT if isinstance(value, str) else AS_NUMBER


Frame = Annotated[
    Annotated[Text, Tag(AS_TEXT)] | Annotated[int, Field(ge=0), Tag(AS_NUMBER)], Discriminator(_kind_of_frame)
]
StopText = Annotated[Text, Field(max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[StopText, Tag(AS_TEXT)]
    | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS), Tag(AS_PARTS)],
    Discriminator(_kind_of_content),
]


class ImageUrl(_Strict):
    """Image of a message: a `data:` URI, and for DICOM files a window and a frame."""

    url: Text
    detail: Literal["auto", "low", "high", "original"] | None = None
    window: Text | None = None
    frame: Frame | None = None


class TextPart(_Strict):
    """Text in the content of a message."""

    neutral = NEUTRAL_OF_PARTS

    type: Literal["text"]
    text: Text


class ImagePart(_Strict):
    """Image in the content of a message."""

    neutral = NEUTRAL_OF_PARTS

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return {"text": AS_TEXT_PART, "image_url": AS_IMAGE_PART}.get(kind) if isinstance(kind, str) else None


Part = Annotated[
    Annotated[TextPart, Tag(AS_TEXT_PART)] | Annotated[ImagePart, Tag(AS_IMAGE_PART)],
    Discriminator(
        _kind_of_part,
        custom_error_type="part_type",
        custom_error_message="expected an object of type text or image_url",
    ),
]
# `fail_fast`: a body has room for millions of wrong elements, and one error names the field.
Parts = Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), Tag(AS_PARTS)]
Content = Annotated[Annotated[Text, Tag(AS_TEXT)] | Parts, Discriminator(_kind_of_content)]


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_TOKEN_IDS)]


class ChatMessage(_Strict):
    """Message of a chat."""

    neutral = NEUTRAL_OF_MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    token_ids: TokenIds | None = None


class ContinuedDialogue(_Strict):
    """Dialogue that the answer continues."""

    sample: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    neutral = NEUTRAL_OF_STREAMS

    include_usage: bool | None = None


class ChatBody(_Strict):
    """Body of POST /v1/chat/completions."""

    neutral = NEUTRAL

    model: Text
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    # Dividing logits by much smaller temperatures overflows.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    dialogue: ContinuedDialogue | None = None
    user: Text | None = None
    metadata: Annotated[dict[Text, Text], Field(fail_fast=True, max_length=MAX_METADATA)] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    parallel_tool_calls: bool | None = None


NAME_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["worker_name"],
    "properties": {
        "worker_name": {"type": "string"},
        "model": {"type": "string"},
        "queue_length": {"type": "integer", "minimum": 0},
    },
}
"""JSON schema of small bodies of the old routes, for documentation."""

REGISTER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["worker_name"],
    "properties": {
        "worker_name": {"type": "string"},
        "check_heart_beat": {"type": "boolean"},
        "worker_status": {"type": ["object", "null"]},
    },
}
"""JSON schema of POST /register_worker."""

GENERATE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "model": {"type": "string"},
        "prompt": {"type": "string"},
        "temperature": {"type": "number", "minimum": 0},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "max_new_tokens": {"type": "integer", "minimum": 1},
        "stop": {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": {"type": "string"}}]},
        "images": {"type": "array", "items": {"type": "string"}},
    },
}
"""JSON schema of POST /worker_generate_stream."""


def chat_schema() -> dict[str, Any]:
    """Return the JSON schema of a chat request, without references."""
    return inlined(ChatBody.model_json_schema())


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with its definitions in the places that refer to them."""
    definitions = schema.get("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return resolved(definitions[value["$ref"].rpartition("/")[2]])
        return {name: resolved(one) for name, one in value.items() if name not in ("$defs", "discriminator")}

    found: dict[str, Any] = resolved(schema)
    return found
