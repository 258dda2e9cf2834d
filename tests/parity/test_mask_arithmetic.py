"""Published masks by counting against ours: one to five turns, with and without an image.

The counting is written here from its description: every round is tokenized alone and its tokens are counted.
"""

from __future__ import annotations

import pytest

from benchmarks.fidelity.published import COUNTINGS, counted_chatml, counted_rounds, counted_v0
from llava.chat_template import Segment
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.data.encode import encode, place_images, tokenize_segments
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation
from tests.support.text_tools import make_processor, talk

WORDS = ("What is seen?", "A lesion of 3 cm.", "Where?", "In the left lung", "Why so?", "It looks dense, naïve.")


def conversation(num_turns: int, *, image: bool) -> Conversation:
    """Return a conversation of `num_turns` questions with their answers."""
    texts = [WORDS[number % len(WORDS)] for number in range(2 * num_turns)]
    return talk(f"{IMAGE_TOKEN}\n{texts[0]}" if image else texts[0], *texts[1:])


def count(text: str, processor: LlavaMedProcessor) -> int:
    """Return the number of tokens of a text alone, including a start token."""
    return len(tokenize_segments([Segment(text, False, 0)], processor).ids)


def rendered(spoken: Conversation, processor: LlavaMedProcessor) -> tuple[str, list[int], list[int]]:
    """Return text, ids and our labels; an image is one token."""
    text = "".join(part.text for part in processor.template.render(place_images(spoken, processor)))
    encoded = encode(spoken, processor, images=["key"] * text.count(IMAGE_TOKEN), max_length=None)
    return text, list(encoded.input_ids), list(encoded.labels)


def by_rounds(text: str, ids: list[int], processor: LlavaMedProcessor, split: str) -> list[int]:
    """Return labels for two separators and brackets, counted round by round."""
    # A round ends with `</s>`; its own start token is counted instead of that token.
    labels, cursor = [IGNORE_INDEX, *ids[1:]], 1
    for part in text.split("</s>"):
        pieces = part.split(split)
        if len(pieces) != 2:
            break
        asked = count(pieces[0] + split, processor) - 2
        labels[cursor : cursor + asked] = [IGNORE_INDEX] * asked
        cursor += count(part, processor)
    assert cursor == len(ids), "the original would ignore the row because of this mismatch"
    return labels


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("num_turns", range(1, 6))
@pytest.mark.parametrize("template", ["vicuna_v1", "v1", "llava_v1", "llama_2", "llava_llama_2"])
def test_rounds(template: str, num_turns: int, image: bool) -> None:
    processor = make_processor(template=template, num_image_tokens=1)
    text, ids, labels = rendered(conversation(num_turns, image=image), processor)
    split = "[/INST] " if "llama_2" in template else " ASSISTANT: "
    assert labels == by_rounds(text, ids, processor, split)
    counted = counted_rounds(ids, text, lambda part: count(part, processor), split, later=0)
    assert (counted.labels, counted.stop) == (labels, len(ids))


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("num_turns", range(1, 6))
def test_chatml(num_turns: int, image: bool) -> None:
    """Older releases count as we mask; LLaVA 1.2 counts one token too few in each round, and ignores the row."""
    processor = make_processor("byte level", template="mpt", num_image_tokens=1)
    text, ids, labels = rendered(conversation(num_turns, image=image), processor)
    older, newer = (
        counted_chatml(ids, text, lambda part: count(part, processor), counting, legacy=False) for counting in COUNTINGS
    )
    assert (older.labels, older.stop) == (labels, len(ids))
    assert newer.stop == len(ids) - num_turns and newer.is_mismatch(len(ids), None, recorded=True)
    assert newer.is_mismatch(len(ids), 10_000, recorded=False) and not newer.is_mismatch(len(ids), 10, recorded=True)
    trained = [label != IGNORE_INDEX for label in labels]
    off_by_one = [label != IGNORE_INDEX for label in newer.labels]
    first, last = trained.index(True), len(trained) - 1 - trained[::-1].index(True)
    assert off_by_one.index(True) == first - 1 and not off_by_one[last]


@pytest.mark.parametrize("template", ["plain", "v0_plain"])
def test_plain(template: str) -> None:
    processor = make_processor(template=template, num_image_tokens=1)
    _, ids, labels = rendered(conversation(1, image=True), processor)
    asked = count(IMAGE_TOKEN, processor)
    assert asked == 2 and labels == [IGNORE_INDEX] * asked + ids[asked:]


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("num_turns", range(1, 6))
@pytest.mark.parametrize("template", ["v0", "bair_v1"])
def test_one_separator(template: str, num_turns: int, image: bool) -> None:
    # `###` is one token alone and two in a text; the start token of a single turn is counted for the second one.
    processor = make_processor(template=template, num_image_tokens=1)
    spoken = conversation(num_turns, image=image)
    _, ids, labels = rendered(spoken, processor)
    assert labels == counted_v0(ids, spoken, processor)
