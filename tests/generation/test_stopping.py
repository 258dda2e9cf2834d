"""Stop strings, role headers and incomplete characters in any text with any tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.conversation import TEMPLATES
from llava.generation.protocol import Sampling
from llava.generation.stopping import AnswerText, StopRule, byte_token_ids
from llava.model.builder import LoadedModel
from llava.tokenization import token_id
from tests.support.text_tools import llama_like
from tests.support.tiny import tiny_llava

RULE = StopRule(frozenset({0}), ("###", "\nab"), ("###", "\nab"), ("###", "Assistant:", "Human:"))


def of_bytes(token_ids: Sequence[int]) -> str:
    """Return the text of tokens that are bytes: token n + 1 is byte n, token 0 is special."""
    return bytes(token - 1 for token in token_ids if token).decode(errors="replace")


def tokens_of(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()]


def generated(text: str, rule: StopRule = RULE) -> tuple[str, list[str]]:
    """Feed a text byte by byte; return the answer and the texts of a stream."""
    answer, shown, ids = AnswerText(rule, of_bytes), [], []
    for token in tokens_of(text):
        ids.append(token)
        if answer.has_ended(ids):
            break
        shown.append(answer.so_far(ids))
    return answer.final(ids), shown


def test_a_stop_string_is_cut_off_wherever_its_tokens_lie() -> None:
    assert generated(" yes, it is ###Human: next") == ("yes, it is", generated(" yes, it is ")[1] + ["yes, it is"] * 2)
    assert generated("a\nabc")[0] == "a"
    assert generated("a\nac")[0] == "a\nac"


def test_repeated_headers_are_neither_answer_nor_stop() -> None:
    for head in ("###Assistant: ", " Assistant:\n### ", "###"):
        answer, shown = generated(f"{head}right.")
        assert answer == "right." and shown[-1] == "right." and "A" not in shown


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    _, shown = generated("a#b##c")
    assert shown == ["a", "a", "a#b", "a#b", "a#b", "a#b##c"]


def test_a_character_is_shown_whole() -> None:
    answer, shown = generated("ä€😀.")
    assert answer == "ä€😀." and set(shown) <= {"", "ä", "ä€", "ä€😀", "ä€😀."}
    torn = tokens_of("x😀")[:-1]
    assert AnswerText(RULE, of_bytes).final(torn) == "x"


@pytest.mark.parametrize("stop", ["#é", "é€", "\n😀", "。。", "ab。", "###é"])
def test_a_stop_string_of_several_bytes_a_character_is_never_shown(stop: str) -> None:
    rule = StopRule(frozenset(), (stop,), (stop,), ())
    answer, shown = generated(f"x{stop}y", rule)
    assert answer == "x" and set(shown) == {"x"}


PIECES = st.lists(
    st.sampled_from(["#", "##", "###", "\n", "ab", "a", " ", "Assistant:", "Ass", "Human:", "é", "😀", "\ufffd", "x"]),
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(PIECES)
def test_a_stream_only_grows_and_ends_as_the_answer(pieces: list[str]) -> None:
    answer, shown = generated("".join(pieces))
    for before, after in pairwise([*shown, answer]):
        assert after.startswith(before)
    assert "###" not in answer and "\nab" not in answer
    assert answer == answer.strip() and not answer.endswith("\ufffd")


@settings(max_examples=100, deadline=None)
@given(PIECES)
def test_the_answer_is_what_the_template_parses(pieces: list[str]) -> None:
    template = TEMPLATES["v0"]
    rule = StopRule(frozenset(), template.stops, template.stops, template.echoes)
    text = "".join(pieces).replace("\ufffd", "")
    assert rule.answer(text) == template.parse(text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["<0x04>", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>", "a", "####"]), max_size=12))
def test_a_stream_of_byte_tokens_only_grows(pieces: list[str]) -> None:
    tokenizer = llama_like()
    ids = [token_id(tokenizer, piece) or 0 for piece in pieces]
    answer = AnswerText(StopRule(frozenset(), (), (), (), byte_token_ids(tokenizer)), tokenizer.decode)
    shown = [answer.so_far(ids[:end]) for end in range(1, len(ids) + 1)]
    assert all(later.startswith(text) for text, later in pairwise([*shown, answer.final(ids)]))


def test_text_is_decoded_only_when_it_is_read() -> None:
    calls: list[int] = []

    def counting(token_ids: Sequence[int]) -> str:
        calls.append(len(token_ids))
        return of_bytes(token_ids)

    silent = AnswerText(replace(RULE, watched=()), counting)
    assert not silent.has_ended(tokens_of("a" * 50)) and silent.has_ended([5, 0]) and not calls
    assert not AnswerText(RULE, counting).has_ended(tokens_of("a" * 500)) and max(calls) < 30


def test_a_long_stop_string_does_not_decode_the_whole_answer_at_each_step() -> None:
    calls: list[int] = []

    def counting(token_ids: Sequence[int]) -> str:
        calls.append(len(token_ids))
        return of_bytes(token_ids)

    stop = "b" * 1000
    answer, ids = AnswerText(StopRule(frozenset(), (stop,), (stop,)), counting), []
    for token in tokens_of("a" * 500 + "b" * 999):
        ids.append(token)
        assert not answer.has_ended(ids)
    assert max(calls) < 50
    assert answer.has_ended([*ids, *tokens_of("b")]) and answer.final([*ids, *tokens_of("b")]) == "a" * 500


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
def test_the_longest_beginning_of_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    rule = StopRule(frozenset(), tuple(stops), tuple(stops))
    places = [text.find(stop) for stop in stops if stop in text]
    held = max(length for stop in stops for length in range(len(stop)) if text.endswith(stop[:length]))
    assert rule.answer_so_far(text) == (text[: min(places)] if places else text[: len(text) - held])


def special_ids(loaded: LoadedModel, *texts: str) -> set[int]:
    return {loaded.processor.tokenizer.convert_tokens_to_ids(text) for text in texts}


def test_stop_strings_that_are_tokens_need_no_text() -> None:
    loaded = tiny_llava(template="chatml")
    rule = StopRule.of(loaded.processor, Sampling(stop=("<|im_start|>", "End")))
    assert rule.token_ids == special_ids(loaded, "</s>", "<|im_end|>", "<|im_start|>")
    assert rule.watched == ("End",) and set(rule.texts) == {"<|im_end|>", "<|im_start|>", "End"}
    loaded = replace(loaded, processor=loaded.processor.changed(template="v0"))
    assert StopRule.of(loaded.processor, Sampling()).watched == ("###",)
