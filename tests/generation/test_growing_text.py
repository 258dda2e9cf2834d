"""Incremental decoding against decoding from the start, with decoders that are not local."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

from llava.conversation import TEMPLATES
from llava.generation.stopping import CONTEXT, AnswerText, GrowingText, StopRule
from tests.support.tiny import byte_tokenizer

Decode = Callable[[Sequence[int]], str]
WORDS = ["\u2581", "\u2581\u2581", "\u2581yes", "no", ".", "\u2581n't", "\u2581do", "###", "#", "é", "\u2581!", "\n"]


def sentencepiece_like() -> Decode:
    """Return a decoder of words with leading spaces and single bytes, which drops the first space."""
    pieces = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return lambda ids: backend.decode(list(ids), skip_special_tokens=True)


def cleaned_up() -> Decode:
    """Return a decoder that drops spaces before punctuation, as `clean_up_tokenization_spaces` does."""
    plain = sentencepiece_like()

    def decode(ids: Sequence[int]) -> str:
        text = plain(ids)
        for found, written in ((" .", "."), (" !", "!"), (" n't", "n't"), (" do not", " don't")):
            text = text.replace(found, written)
        return text

    return decode


def byte_level() -> Decode:
    tokenizer = byte_tokenizer()
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


BYTES = [list(text.encode()) for text in ("a", "é", "€", "😀", " ", "###", "Assistant:", "\ufffd")] + [
    [0xF0],
    [0x9F, 0x98],
]
SENTENCEPIECE, CLEANED_UP, BYTE_LEVEL = sentencepiece_like(), cleaned_up(), byte_level()
BYTE_IDS = byte_tokenizer().convert_tokens_to_ids(list(byte_tokenizer().get_vocab()))
WORD_IDS = st.lists(st.sampled_from([*range(len(WORDS)), len(WORDS) + 256]), max_size=20)
BYTE_RUNS = st.lists(st.sampled_from(BYTES), max_size=10).map(
    lambda runs: [len(WORDS) + byte for run in runs for byte in run]
)


def assert_equal_at_every_step(decode: Decode, token_ids: list[int]) -> None:
    growing = GrowingText(decode)
    for stop in range(1, len(token_ids) + 1):
        assert growing.text(token_ids[:stop]) == decode(token_ids[:stop])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(WORD_IDS, BYTE_RUNS), max_size=6), st.sampled_from([SENTENCEPIECE, CLEANED_UP]))
def test_words_and_single_bytes_are_decoded_as_from_the_start(runs: list[list[int]], decode: Decode) -> None:
    assert_equal_at_every_step(decode, [token for run in runs for token in run])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(sorted(BYTE_IDS)), max_size=80))
def test_any_tokens_of_a_byte_level_vocabulary_are_decoded_as_from_the_start(token_ids: list[int]) -> None:
    assert_equal_at_every_step(BYTE_LEVEL, token_ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(WORD_IDS, BYTE_RUNS), max_size=5))
def test_stops_and_streams_are_those_of_decoding_from_the_start(runs: list[list[int]]) -> None:
    template = TEMPLATES["v0"]
    rule = StopRule(frozenset(), (*template.stops, " n't"), (*template.stops, " n't"), template.echoes)
    answer, ids = AnswerText(rule, CLEANED_UP), []
    for token in (token for run in runs for token in run):
        ids.append(token)
        ended = answer.has_ended(ids)
        assert answer.so_far(ids) == rule.answer_so_far(CLEANED_UP(ids))
        assert ended == AnswerText(rule, CLEANED_UP).has_ended(ids)
        if ended:
            assert answer.final(ids) == rule.answer(CLEANED_UP(ids))
            break


@pytest.mark.parametrize("decode", [SENTENCEPIECE, BYTE_LEVEL])
def test_another_answer_starts_from_the_beginning(decode: Decode) -> None:
    growing = GrowingText(decode)
    first, second = [3, 4, 5] * 20, [6, 4, 5] * 20
    for ids in (first, second, first[:30], second[:31], first):
        assert growing.text(ids) == decode(ids)


def test_a_step_decodes_no_more_than_the_newest_tokens() -> None:
    calls: list[int] = []

    def counting(ids: Sequence[int]) -> str:
        calls.append(len(ids))
        return SENTENCEPIECE(ids)

    growing = GrowingText(counting)
    for stop in range(1, 500):
        growing.text([2] * stop)
    assert max(calls) <= 2 * CONTEXT


def test_tokens_without_a_text_are_no_context() -> None:
    special, no = len(WORDS) + 256, WORDS.index("\u2581do")
    assert_equal_at_every_step(SENTENCEPIECE, [WORDS.index("\u2581yes"), *[special] * (2 * CONTEXT), no, no])
