"""Placeholders of images in conversations."""

from __future__ import annotations

import pytest

from llava.errors import DataError
from llava.samples import Conversation, Origin, Sample, Turn, with_placeholders


def sample(*texts: str, images: tuple[str, ...] = ()) -> Sample:
    turns = tuple(Turn("gpt" if index % 2 else "human", text) for index, text in enumerate(texts))
    return Sample("a", Conversation(turns, "system"), images, origin=Origin("train.json", 4))


@pytest.mark.parametrize(
    ("texts", "images"),
    [(("q", "a"), ()), (("q\n<image>", "a", "q"), ("x",)), (("<image> or <image>?", "a", "<image>"), ("x", "y", "z"))],
)
def test_as_many_places_as_images_stay_as_they_are(texts: tuple[str, ...], images: tuple[str, ...]) -> None:
    row = sample(*texts, images=images)
    assert with_placeholders(row) is row.conversation


def test_images_without_a_place_go_in_front_of_the_first_question() -> None:
    placed = with_placeholders(sample("q", "a", "q2", images=("x", "y")))
    assert [turn.text for turn in placed.turns] == ["<image>\n<image>\nq", "a", "q2"]
    assert placed.system == "system"


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (("<image>\nq", "a"), (), r"train\.json, row 4, id 'a': the text has 1 .* the row names no image"),
        (("<image>\nq", "a"), ("x", "y"), r"has 1 .* the row names 2 image"),
        (("<image><image>q", "a"), ("x",), r"has 2 .* the row names 1 image"),
    ],
)
def test_another_number_of_placeholders_is_an_error(
    texts: tuple[str, ...], images: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        with_placeholders(sample(*texts, images=images))
