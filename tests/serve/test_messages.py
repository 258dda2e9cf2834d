"""Schemas of both protocols: every field is read, refused or without effect by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llava.generation.protocol import UNLIMITED, History
from llava.samples import Turn
from llava.serve.failures import CODES, RequestError
from llava.serve.messages import MAX_MARKS, parse_chat, parse_generate, parse_json
from llava.serve.schemas import ChatBody

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
PIXEL = "data:image/png;base64,AAAA"


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def image(**fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": PIXEL, **fields}}


def text(value: Any) -> dict[str, Any]:
    return {"type": "text", "text": value}


def refusal(body: dict[str, Any]) -> tuple[str, str | None]:
    with pytest.raises(RequestError) as caught:
        parse_chat({**HELLO, **body})
    assert caught.value.code in CODES
    return caught.value.code, caught.value.param


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"foo": 1}, "unknown_parameter", "foo"),
    ({"tools": [{}]}, "unsupported_parameter", "tools"),
    ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
    ({"frequency_penalty": False}, "unsupported_parameter", "frequency_penalty"),
    ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    ({"model": 5}, "invalid_value", "model"),
    ({"temperature": float("nan")}, "invalid_value", "temperature"),
    ({"temperature": float("inf")}, "invalid_value", "temperature"),
    ({"temperature": "1"}, "invalid_value", "temperature"),
    ({"temperature": -1}, "invalid_value", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 17}, "invalid_value", "n"),
    ({"n": True}, "invalid_value", "n"),
    ({"stop": ["a", ""]}, "invalid_value", "stop"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": ["a"] * 17}, "invalid_value", "stop"),
    ({"stop": 5}, "invalid_value", "stop"),
    ({"stop": "a" * 1001}, "invalid_value", "stop"),
    ({"stop": ["a", "a" * 1001]}, "invalid_value", "stop[1]"),
    ({"stop": "\ud800"}, "invalid_value", "stop"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": 1.5}, "invalid_value", "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "max_completion_tokens"),
    ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "invalid_value", "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({"stream": True, "stream_options": {"more": 1}}, "unknown_parameter", "stream_options.more"),
    ({"metadata": {"a": 1}}, "invalid_value", "metadata.a"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": "Hello"}, "invalid_value", "messages"),
    ({"messages": [5]}, "invalid_value", "messages[0]"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "unsupported_parameter", "messages[0].name"),
    ({"messages": [{"role": "user", "content": "a", "more": 1}]}, "unknown_parameter", "messages[0].more"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_content", "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "invalid_value", "messages[0].content"),
    (user(text("a"), {"type": "audio"}), "invalid_value", "messages[0].content[1]"),
    (user(text(5)), "invalid_value", "messages[0].content[0].text"),
    (user(text("\udfff")), "invalid_content", "messages[0].content[0].text"),
    (user(image(url=5)), "invalid_value", "messages[0].content[0].image_url.url"),
    (user(image(size=5)), "unknown_parameter", "messages[0].content[0].image_url.size"),
    (user(image(detail="huge")), "invalid_value", "messages[0].content[0].image_url.detail"),
    (user(image(window="bones")), "invalid_value", "messages[0].content[0].image_url.window"),
    (user(image(frame="last")), "invalid_value", "messages[0].content[0].image_url.frame"),
    (user(image(frame=-1)), "invalid_value", "messages[0].content[0].image_url.frame"),
    (user(image(frame="9" * 5000)), "invalid_value", "messages[0].content[0].image_url.frame"),
    (user({**text("a"), "more": 1}), "unknown_parameter", "messages[0].content[0].more"),
    (user({**text("a"), "prompt_cache_breakpoint": {"mode": "explicit"}}), "unsupported_parameter",
     "messages[0].content[0].prompt_cache_breakpoint"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "unsupported_parameter",
     "stream_options.include_obfuscation"),
    ({"prompt_cache_options": {"mode": "explicit"}}, "unsupported_parameter", "prompt_cache_options"),
    ({"moderation": {"model": "m"}}, "unsupported_parameter", "moderation"),
    ({"\ud800": 1}, "unknown_parameter", "?"),
    ({"messages": [{"role": "user", "content": "a", "a\udfff": 1}]}, "unknown_parameter", "messages[0].a?"),
    ({"<text>": 1}, "unknown_parameter", "<text>"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "param"), REFUSED, ids=[f"{i}-{row[2]}" for i, row in enumerate(REFUSED)])
def test_refused_fields_are_named(body: dict[str, Any], code: str, param: str) -> None:
    assert refusal(body) == (code, param)


@pytest.mark.parametrize(
    "roles",
    [
        ["assistant"],
        ["user", "assistant"],
        ["user", "system"],
        ["system"],
        ["assistant", "user"],
        ["user", "developer", "user"],
    ],
)
def test_wrong_orders_of_roles(roles: list[str]) -> None:
    messages = [{"role": role, "content": "a"} for role in roles]
    code, param = refusal({"messages": messages})
    assert code == "invalid_value" and str(param).endswith(".role")


def test_a_missing_model_is_named() -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat({"messages": HELLO["messages"]})
    assert (caught.value.code, caught.value.param) == ("invalid_value", "model")


@pytest.mark.parametrize(
    "body",
    [
        {"tools": []},
        {"tools": None},
        {"frequency_penalty": 0.0},
        {"logit_bias": {}},
        {"response_format": {"type": "text"}},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        {"temperature": None, "n": None, "stop": None},
        {"messages": [{"role": "user", "content": "Hello", "tool_calls": None, "refusal": None}]},
        {"moderation": None, "prompt_cache_options": {"mode": "implicit"}},
    ],
)
def test_neutral_values_are_accepted_without_effect(body: dict[str, Any]) -> None:
    assert parse_chat({**HELLO, **body}) == parse_chat(HELLO)


def test_neutral_fields_of_parts_are_accepted() -> None:
    neutral = {"prompt_cache_breakpoint": None}
    body = user({**text("a"), **neutral}, {**image(), **neutral})
    assert parse_chat({**HELLO, **body}) == parse_chat({**HELLO, **user(text("a"), image())})


def test_neutral_options_of_a_stream_are_accepted() -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    assert parse_chat({**HELLO, "stream": True, "stream_options": options}).include_usage


NAMES_OF_MANY: dict[str, Any] = {f"name {number}": 1 for number in range(200)}


@pytest.mark.parametrize(
    "fields",
    [
        NAMES_OF_MANY,
        {"messages": [{"role": "user", "content": "a", **NAMES_OF_MANY}]},
        {"messages": [{"role": "user", "content": [{**text("a"), **NAMES_OF_MANY}]}]},
        {"messages": [{"role": "user", "content": [image(**NAMES_OF_MANY)]}]},
        {"messages": [{"role": "assistant", "content": "", "token_ids": [""] * 200}] * 3},
        {"messages": [{}] * 200},
        {"messages": [{"role": "user", "content": [1] * 200}]},
        {"stop": [1] * 10},
        {"metadata": NAMES_OF_MANY},
        {"stream_options": NAMES_OF_MANY},
        {"dialogue": NAMES_OF_MANY},
    ],
)
def test_reading_stops_at_the_first_wrong_element(fields: dict[str, Any]) -> None:
    # Each error takes 1 kB, and a body has room for millions of wrong elements. A message has no more than two errors.
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({**HELLO, **fields})
    assert caught.value.error_count() <= 2


def test_messages_of_one_role_become_one_turn() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "developer", "content": "T"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": [text("b"), text("c")]},
        {"role": "assistant", "content": [text("d")]},
        {"role": "user", "content": "e"},
    ]
    conversation = parse_chat({**HELLO, "messages": messages}).conversation
    assert conversation.system == "S\n\nT"
    assert conversation.turns == (Turn("human", "a\n\nb\nc"), Turn("gpt", "d"), Turn("human", "e"))


def test_images_have_their_place_window_and_frame() -> None:
    body = user(image(), text("What?"), image(window="lung", frame=3))
    request = parse_chat({**HELLO, **body})
    assert request.conversation.turns[0].text == "<image>\nWhat?\n<image>"
    assert [(one.window, one.frame) for one in request.images] == [(None, None), ("lung", "3")]
    assert request.images[1].param == "messages[0].content[2].image_url.url"


def test_sampling_parameters() -> None:
    body = {"temperature": 1, "top_p": 0.5, "top_k": 4, "n": 2, "seed": 7, "stop": ["x", "x"], "max_tokens": 9}
    sampling = parse_chat({**HELLO, **body, "logprobs": True}).sampling.sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.n, sampling.seed) == (1, 0.5, 4, 2, 7)
    assert (sampling.stop, sampling.max_new_tokens, sampling.logprobs) == (("x",), 9, True)
    default = parse_chat(HELLO).sampling.sampling()
    assert (default.temperature, default.max_new_tokens, default.n) == (0.0, UNLIMITED, 1)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b"null", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_bodies_that_are_no_objects(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_json(body)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    "body", [b'{"n": 1, "n": 1}', b'{"messages": [{"role": "user", "content": "a", "role": "assistant"}]}']
)
def test_a_name_that_an_object_has_twice_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_json(body)
    assert caught.value.code == "invalid_json" and "twice" in str(caught.value)


@pytest.mark.parametrize("value", ["[" + "[],", "[" + "{},", '{"a":'])
def test_a_body_of_too_many_lists_objects_or_names_is_not_read(value: str) -> None:
    body = b'{"a": ' + value.encode() * MAX_MARKS
    with pytest.raises(RequestError) as caught:
        parse_json(body)
    assert caught.value.code == "invalid_value"


def test_a_large_image_is_one_text() -> None:
    assert parse_json(b'{"url": "' + b"A" * (1 << 20) + b'"}') == {"url": "A" * (1 << 20)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["model", "messages", "stop", "n", "prompt", "images", "role", "content", "image_url", "tools"])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(NAMES | st.text(max_size=4), JSON, max_size=5))
def test_any_object_is_read_or_refused(body: dict[str, Any]) -> None:
    for parse in (parse_chat, parse_generate):
        for value in (body, {**HELLO, **body}):
            try:
                parse(value)
            except RequestError as error:
                assert error.code in CODES


OLD: dict[str, Any] = {"model": "m", "prompt": "Hi"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (1.0, 1.0, 256, ())),
        ({"temperature": 0.0009}, (0.0, 1.0, 256, ())),
        ({"temperature": 0.001, "top_p": 0.5}, (0.001, 0.5, 256, ())),
        ({"max_new_tokens": 5000}, (1.0, 1.0, 1024, ())),
        ({"stop": None}, (1.0, 1.0, 256, ())),
        ({"stop": ""}, (1.0, 1.0, 256, ())),
        ({"stop": "###"}, (1.0, 1.0, 256, ("###",))),
        ({"stop": "a" * 1000}, (1.0, 1.0, 256, ("a" * 1000,))),
        ({"stop": ["a", "", "b"]}, (1.0, 1.0, 256, ("a", "b"))),
    ],
)
def test_old_fields(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    sampling = parse_generate({**OLD, **fields}).sampling.sampling()
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.stop) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.0}, "max_new_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop": "a" * 1001}, "stop"),
        ({"stop": ["a", "a" * 1001]}, "stop"),
        ({"images": "abc"}, "images"),
        ({"images": [1]}, "images"),
        ({"images": [""] * 5000}, "images"),
        ({"model": 1}, "model"),
    ],
)
def test_wrong_old_fields(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_generate({**OLD, **fields})
    assert (caught.value.code, caught.value.param) == ("invalid_value", param)


def turn(role: str, content: str, *ids: int) -> dict[str, Any]:
    return {"role": role, "content": content, **({"token_ids": list(ids)} if ids else {})}


def test_a_dialogue_has_the_tokens_of_its_answers() -> None:
    messages = [turn("system", "S"), turn("user", "A"), turn("assistant", "", 4, 5), turn("user", "B")]
    read = parse_chat({**HELLO, "messages": messages, "dialogue": {"sample": 3}})
    assert read.history == History(((4, 5),), 3) and [one.text for one in read.conversation.turns] == ["A", "", "B"]
    assert parse_chat({**HELLO, "dialogue": {}}).history == History()
    assert parse_chat(HELLO).history is None


ASKED = [turn("user", "A"), turn("assistant", "", 4), turn("user", "B")]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": ASKED}, "messages[1].token_ids"),
        ({"messages": [*ASKED[:1], turn("assistant", "x", 4), *ASKED[2:]], "dialogue": {}}, "messages[1].token_ids"),
        ({"messages": [turn("user", "", 4)], "dialogue": {}}, "messages[0].token_ids"),
        ({"messages": [*ASKED, turn("assistant", "x"), turn("user", "C")], "dialogue": {}}, "messages[3].token_ids"),
        ({"messages": [*ASKED[:2], *ASKED[1:]], "dialogue": {}}, "messages"),
        ({"messages": ASKED, "dialogue": {}, "n": 2}, "n"),
        ({"messages": [*ASKED[:1], turn("assistant", "", -1), *ASKED[2:]], "dialogue": {}}, "messages[1].token_ids[0]"),
        ({"dialogue": {"sample": -1}}, "dialogue.sample"),
        ({"dialogue": {}, "logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        ({"dialogue": {}, "logprobs": True, "repetition_penalty": 1.5}, "repetition_penalty"),
        ({"dialogue": {"more": 1}}, "dialogue.more"),
    ],
)
def test_wrong_dialogues_are_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(fields)[1] == param
