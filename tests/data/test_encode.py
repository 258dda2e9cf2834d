from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IGNORE_INDEX, IM_END_TOKEN, IM_START_TOKEN
from llava.conversation import TEMPLATES
from llava.data.encode import encode, encode_prompt, encode_rendered
from llava.errors import DataError
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Turn
from tests.support.text_tools import KINDS, byte_level, llama_like, make_processor, talk, trained_text

_MADE: dict[str, LlavaMedProcessor] = {}


def processor_of(kind: str, template: str) -> LlavaMedProcessor:
    if kind not in _MADE:
        _MADE[kind] = make_processor(kind)
    return _MADE[kind].changed(template=template)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1, max_size=20)
SAFE = WORDS.filter(lambda text: "<" not in text and bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Draw one to three questions with answers, with up to two images anywhere in each question."""
    turns: list[Turn] = []
    for _ in range(draw(st.integers(1, 3))):
        parts = [draw(SAFE), *(["<image>"] * draw(st.integers(0, 2)))]
        turns += [Turn("human", "".join(draw(st.permutations(parts)))), Turn("gpt", draw(SAFE))]
    return Conversation(tuple(turns))


def num_images(conversation: Conversation) -> int:
    return sum(turn.text.count("<image>") for turn in conversation.turns)


def expected_trained(processor: LlavaMedProcessor, conversation: Conversation) -> str:
    """Return the text of the trained segments; tokens may end after a segment but must start in it."""
    return "".join(segment.text for segment in processor.template.render(conversation) if segment.trained)


@settings(max_examples=25)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", sorted(TEMPLATES))
@given(conversation=conversations())
def test_labels_are_the_spans_of_trained_segments(template: str, kind: str, conversation: Conversation) -> None:
    processor = processor_of(kind, template)
    keys = [f"image {i}" for i in range(num_images(conversation))]
    encoded = encode(conversation, processor, images=keys, max_length=None)
    assert encoded.images == tuple(keys)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert encoded.labels[0] == IGNORE_INDEX
    assert list(encoded.turns) == sorted(encoded.turns)
    assert encoded.input_ids.count(processor.image_token_id) == len(keys) * processor.num_image_tokens
    for start, stop in encoded.image_spans:
        assert set(encoded.input_ids[start:stop]) == {processor.image_token_id}
        assert (stop - start, set(encoded.labels[start:stop])) == (processor.num_image_tokens, {IGNORE_INDEX})
    first = processor.template.render(conversation)[0]
    if processor.text.bos_ids or not first.trained:  # otherwise the first token has no token before it
        assert trained_text(conversation, processor) == expected_trained(processor, conversation)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("kind", KINDS)
def test_trained_tokens_decode_to_answers_and_end_marks(kind: str, template: str) -> None:
    processor = processor_of(kind, template)
    encoded = encode(talk("<image>\nIs a lesion seen?", "Yes, es."), processor, images=["k"], max_length=None)
    trained = [label for label in encoded.labels if label != IGNORE_INDEX]
    decoded = processor.tokenizer.decode(trained, skip_special_tokens=False)
    assert "Yes, es." in decoded
    assert "lesion" not in decoded
    for stop in processor.template.stops:
        assert stop in decoded


@settings(max_examples=60)
@given(conversation=conversations(), max_length=st.integers(1, 200), kind=st.sampled_from(sorted(KINDS)))
def test_truncation_keeps_every_image_whole(conversation: Conversation, max_length: int, kind: str) -> None:
    processor = processor_of(kind, "vicuna_v1")
    keys = [str(i) for i in range(num_images(conversation))]
    full = encode(conversation, processor, images=keys, max_length=None)
    blocked = len(keys) * processor.num_image_tokens
    if max_length <= blocked and len(full.input_ids) > max_length:
        with pytest.raises(DataError, match=f"take {blocked} tokens, which leaves no text within .* {max_length}"):
            encode(conversation, processor, images=keys, max_length=max_length)
        return
    cut = encode(conversation, processor, images=keys, max_length=max_length)
    assert len(cut.input_ids) == min(max_length, len(full.input_ids))
    assert cut.num_cut == len(full.input_ids) - len(cut.input_ids)
    assert len(cut.image_spans) == len(keys)
    assert all(set(cut.input_ids[a:b]) == {processor.image_token_id} for a, b in cut.image_spans)
    assert sum(b - a for a, b in cut.image_spans) == blocked
    text = [token for token in full.input_ids if token != processor.image_token_id]
    kept = [token for token in cut.input_ids if token != processor.image_token_id]
    assert kept == text[: len(kept)]


def test_markers_are_part_of_the_block() -> None:
    tokenizer = llama_like(added=("<image>", IM_START_TOKEN, IM_END_TOKEN))
    processor = LlavaMedProcessor(
        tokenizer, None, template="mistral_instruct", num_image_tokens=3, use_im_start_end=True, placement="as_written"
    )
    encoded = encode(talk("A long question <image>", "A"), processor, images=["k"], max_length=8)
    pieces = tokenizer.convert_ids_to_tokens(list(encoded.input_ids))
    assert pieces == ["<s>", "▁", "[", IM_START_TOKEN, "<image>", "<image>", "<image>", IM_END_TOKEN]
    assert encoded.image_spans == ((4, 7),)
    with pytest.raises(DataError, match="1 images take 5 tokens"):
        encode(talk("A long question <image>", "A"), processor, images=["k"], max_length=5)


def test_an_image_may_count_as_one_token() -> None:
    """LLaVA-Rad truncated its rows before it expanded the images."""
    processor = make_processor(num_image_tokens=4)
    conversation = talk("<image>\nA long question", "A long answer")
    full = encode(conversation, processor, images=["k"], max_length=None)
    limit = len(full.input_ids) - 6
    cut = encode(conversation, processor, images=["k"], max_length=limit, image_counts_as_one=True)
    assert len(cut.input_ids) == limit + 3
    assert cut.num_cut == 3
    text_only = encode(talk("A long question", "A long answer"), processor, max_length=10, image_counts_as_one=True)
    assert len(text_only.input_ids) == 10


def test_white_space_around_image_blocks_can_be_dropped() -> None:
    tokenizer = llama_like(added=("<im_patch>", IM_START_TOKEN, IM_END_TOKEN))
    settings_1_0: dict[str, Any] = {"placement": "as_written", "use_im_start_end": True, "strip_around_images": True}
    processor = LlavaMedProcessor(tokenizer, None, template="mistral_instruct", num_image_tokens=1, **settings_1_0)
    encoded = encode(talk("Q \n<image>\n <image> \n", "A"), processor, images=["k", "l"], max_length=None)
    block = ["<im_start>", "<im_patch>", "<im_end>"]
    pieces = tokenizer.convert_ids_to_tokens(list(encoded.input_ids))
    assert pieces[:8] == ["<s>", "▁", "[", "I", "N", "S", "T", "]"]
    assert pieces[8:] == ["▁", "Q", *block, *block, "▁", "[", "/", "I", "N", "S", "T", "]", "▁", "A", "▁", "</s>"]
    trained = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(trained) == ["▁", "A", "▁", "</s>"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - {"plain", "v0_plain"}))
def test_prompt_tokens_begin_the_training_sequence(kind: str, template: str) -> None:
    processor = processor_of(kind, template)
    asked, answered = ("<image>\nQ", "A", "Why ≥ 2?"), ("<image>\nQ", "A", "Why ≥ 2?", "So it is.")
    prompt = encode_prompt(talk(*asked), processor, images=["k"])
    full = encode(talk(*answered), processor, images=["k"], max_length=None)
    assert set(prompt.labels) == {IGNORE_INDEX}
    assert full.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert full.image_spans == prompt.image_spans
    rest = full.labels[len(prompt.input_ids) :]
    assert rest[0] != IGNORE_INDEX  # the first thing to be generated is the first that was trained


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["v1_sq", "chatml_sq"])
def test_a_prompt_after_an_answer_begins_the_sequence_of_an_asked_question(kind: str, template: str) -> None:
    processor = processor_of(kind, template)
    turns = talk("<image>\nQ", "A", "Why ≥ 2?", "So.").turns
    asked = Conversation((*turns[:2], replace(turns[2], train=True), turns[3]))
    prompt = encode_prompt(Conversation(turns[:2]), processor, images=["k"])
    full = encode(asked, processor, images=["k"], max_length=None)
    place = len(prompt.input_ids)
    assert full.input_ids[:place] == prompt.input_ids and set(prompt.labels) == {IGNORE_INDEX}
    assert full.labels[place - 1] == IGNORE_INDEX != full.labels[place]
    question = [label for label, turn in zip(full.labels, full.turns, strict=True) if turn == 2 and label >= 0]
    assert processor.tokenizer.decode(question).strip() == "Why ≥ 2?" + processor.template.end_mark()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["v1", "mistral_instruct", "llava_med_v1.0:v1"])
def test_a_rendered_prompt_has_the_tokens_of_its_conversation(kind: str, template: str) -> None:
    processor = processor_of(kind, template)
    turns = [Turn("human", "<image>\nWhat is this?"), Turn("gpt", "A scan."), Turn("human", "Of what?")]
    conversation = Conversation(tuple(turns))
    text = processor.template.prompt(conversation)
    expected = encode_prompt(conversation, processor, images=["a"])
    found = encode_rendered(text, processor, images=["a"])
    assert (found.input_ids, found.image_spans, found.images) == (
        expected.input_ids,
        expected.image_spans,
        expected.images,
    )
    with pytest.raises(DataError, match="1 <image> placeholders but 2 images"):
        encode_rendered(text, processor, images=["a", "b"])


def test_images_are_placed_in_front_or_left() -> None:
    front, written = make_processor(), make_processor(placement="as_written")
    conversation = talk("One <image> two <image>", "A")
    text = front.tokenizer.decode
    shown = text(encode(conversation, front, images=["a", "b"], max_length=None).input_ids)
    assert "<image><image><image>\n<image><image><image>\nOne  two" in shown.replace("\n ", "\n").replace("> ", ">")
    spans = encode(conversation, written, images=["a", "b"], max_length=None).image_spans
    assert spans[1][0] - spans[0][1] > 1


def test_turn_flags_reach_the_labels() -> None:
    processor = make_processor()
    turns = (Turn("human", "Q1"), Turn("gpt", "A1", train=False), Turn("human", "Q2", train=True), Turn("gpt", "A2"))
    encoded = encode(Conversation(turns), processor, max_length=None)
    trained = {turn for turn, label in zip(encoded.turns, encoded.labels, strict=True) if label != IGNORE_INDEX}
    assert trained == {2, 3}


def test_first_token_is_never_trained() -> None:
    processor = LlavaMedProcessor(byte_level(), None, template="plain", num_image_tokens=1)
    encoded = encode(talk("Q", "xyz"), processor, max_length=None)
    assert processor.tokenizer.decode(encoded.input_ids) == "xyz\n"
    assert encoded.labels == (IGNORE_INDEX, *encoded.input_ids[1:])


def test_errors_say_what_to_do() -> None:
    processor = make_processor()
    with pytest.raises(DataError, match="has 1 <image> placeholders but 0 images are given; write exactly one <image>"):
        encode(talk("<image>\nQ", "A"), processor, max_length=None)
    with pytest.raises(DataError, match="has 0 <image> placeholders but 1 images"):
        encode_prompt(talk("Q"), processor, images=["k"])
    patches = LlavaMedProcessor(llama_like(added=("<im_patch>",)), None, template="v1", num_image_tokens=2)
    with pytest.raises(DataError, match="the text itself contains <im_patch>"):
        encode(talk("What is <im_patch>?", "A"), patches, max_length=None)


def test_no_begin_of_text_where_the_tokenizer_has_none() -> None:
    processor = LlavaMedProcessor(byte_level(), None, template="mistral_instruct", num_image_tokens=1)
    encoded = encode(talk("Q", "A"), processor, max_length=None)
    assert processor.tokenizer.decode(encoded.input_ids) == "[INST] Q [/INST] A </s>"
