"""Conversion between samples and JSON rows."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.errors import DataError
from llava.samples import Conversation, Origin, Sample, Turn, from_row, num_lost_turns, sample_label, to_row


def row(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": "a", "conversations": [{"from": who, "value": what} for who, what in turns], **fields}


def test_a_row_of_the_vqa_layout() -> None:
    sample = from_row(
        row(
            ("human", "Which side?\n<image>"),
            ("gpt", "left"),
            image="test/1.jpg",
            answer_type="OPEN",
            question_type="pos",
        )
    )
    assert sample == Sample(
        "a",
        Conversation((Turn("human", "Which side?\n<image>"), Turn("gpt", "left"))),
        ("test/1.jpg",),
        {"answer_type": "OPEN", "question_type": "pos"},
    )


def test_what_published_files_get_wrong_is_read() -> None:
    turns = [{"from": "user", "value": "How many?"}, {"from": "assistant", "value": 3}]
    sample = from_row({"id": 17, "conversatons": turns, "image": ["a.png", "b.png"]})
    assert sample.id == "17"
    assert sample.conversation.turns == (Turn("human", "How many?"), Turn("gpt", "3"))
    assert sample.images == ("a.png", "b.png")
    written = to_row(sample)
    assert written["id"] == 17
    assert "conversations" in written and "conversatons" not in written


def test_an_answer_before_the_first_question_is_left_out() -> None:
    raw = row(("gpt", "hello"), ("human", "q"), ("gpt", "a"))
    sample = from_row(raw)
    assert [turn.text for turn in sample.conversation.turns] == ["q", "a"]
    assert num_lost_turns(raw, sample) == 1
    clean = row(("system", "Be brief."), ("human", "q"))
    assert num_lost_turns(clean, from_row(clean)) == 0


def test_a_system_turn_becomes_the_system_text() -> None:
    sample = from_row(row(("system", "Be brief."), ("human", "q"), ("gpt", "a")))
    assert sample.conversation.system == "Be brief."
    assert len(sample.conversation.turns) == 2


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"id": "a"}, "'conversations' is missing; the row has 'id'"),
        ({**row(("human", "q")), "id": None}, "'id' is missing"),
        ({**row(("human", "q")), "id": 1.5}, "'id' must be"),
        ({"id": "a", "conversations": {"from": "human"}}, "must be a list of turns, got dict"),
        ({"id": "a", "conversations": ["hello"]}, r"conversations\[0\] must be an object"),
        ({"id": "a", "conversations": [{"from": "human"}]}, r"conversations\[0\].value must be text"),
        (row(("human", "q"), ("gpt", None)), r"conversations\[1\].value must be text or a number, got NoneType"),
        (row(("human", "q"), ("gpt", True)), r"conversations\[1\].value"),
        (
            row(("doctor", "q")),
            r"conversations\[0\].from must be one of human, user, gpt, assistant, vuser, got str of length 6",
        ),
        (row(("human", "q"), ("human", "q")), r"conversations\[1\]: two turns in a row from 'human'"),
        (row(("gpt", "a"), ("gpt", "a"), ("human", "q")), r"conversations\[1\]: two turns in a row from 'gpt'"),
        (row(("gpt", "a")), "has no question"),
        (row(), "has no question"),
        (row(("human", "q"), image=5), "'image' must be a file name"),
        (row(("human", "q"), image=["a", ""]), "'image' must be"),
        ([1], "must be a JSON object"),
    ],
)
def test_an_unusable_field_is_named(raw: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_row(raw)


SECRET = "Jane Doe, 1 May 1950"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (row(("human", [SECRET, "q"])), "list of length 2"),
        (row(("human", {"text": SECRET})), "dict of length 1"),
        (row((SECRET, "q")), f"str of length {len(SECRET)}"),
        ({**row(("human", "q")), "image": {"name": SECRET}}, "dict of length 1"),
        ({**row(("human", "q")), "image": [SECRET, ""]}, "list of length 2"),
        ({**row(("human", "q")), "id": [SECRET]}, "list of length 1"),
        ({"id": "a", "conversations": [{"from": "human", "value": "q", "train": SECRET}]}, "str of length 20"),
    ],
)
def test_messages_do_not_repeat_what_a_row_holds(raw: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"got {message}$") as caught:
        from_row(raw)
    assert "Jane" not in str(caught.value)


NAMED = ("id", "image", "images", "img", "figure", "picture", "conversations", "conversatons")
texts = st.text(max_size=20)
turns = st.lists(st.tuples(texts, st.sampled_from([None, True, False])), min_size=1, max_size=5)
metas = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name not in NAMED),
    st.none() | st.integers() | texts | st.lists(st.integers(), max_size=3),
    max_size=3,
)


@given(
    turns=turns,
    system=st.none() | texts,
    images=st.lists(st.text(min_size=1, max_size=8), max_size=3).map(tuple),
    meta=metas,
    identity=texts,
)
def test_a_row_read_back_is_the_same_sample(
    *, turns: list[tuple[str, bool | None]], system: str | None, images: tuple[str, ...], meta: Any, identity: str
) -> None:
    spoken = tuple(Turn("gpt" if index % 2 else "human", text, train) for index, (text, train) in enumerate(turns))
    sample = Sample(identity, Conversation(spoken, system), images, meta)
    assert from_row(json.loads(json.dumps(to_row(sample)))) == sample


def test_the_origin_names_the_row_and_is_no_part_of_equality() -> None:
    sample = from_row(row(("human", "q")))
    placed = Sample(sample.id, sample.conversation, origin=Origin("train.json", 17))
    assert placed == sample
    assert sample_label(placed) == "train.json, row 17, id 'a'"
    assert sample_label(sample) == "id 'a'"
    assert pickle.loads(pickle.dumps(placed)).origin == Origin("train.json", 17)


IMAGES_ELSEWHERE = [
    ({"images": ["a.png"]}, ("a.png",)),
    ({"images": "a.png"}, ("a.png",)),
    ({"image": None, "images": ["a.png", "b.png"]}, ("a.png", "b.png")),
    ({"image": "", "images": ["a.png"]}, ("a.png",)),
    ({"image": "a.png", "images": ["a.png"]}, ("a.png",)),
    ({"image": "a.png", "images": [{"bytes": None}]}, ("a.png",)),
    ({"image": "a.png", "images": [], "figure": "Figure 2"}, ("a.png",)),
    ({"images": [], "img": None, "figure": ""}, ()),
    ({"figure_number": "3", "caption": "Figure 3", "figure": 3}, ()),
    ({"id": "a.png", "source": "see a.png", "files": ["a.png", 3], "url": "http://a/b.html", "tags": []}, ()),
    ({"image": "a.png", "photo": "b.png"}, ("a.png",)),
]


@pytest.mark.parametrize(("fields", "images"), IMAGES_ELSEWHERE)
def test_images_means_the_same_as_image(fields: dict[str, Any], images: tuple[str, ...]) -> None:
    sample = from_row(row(("human", "q"), ("gpt", "a"), **fields))
    assert sample.images == images
    assert from_row(to_row(sample)) == sample


@pytest.mark.parametrize(
    "fields",
    [
        {name: "a.png"}
        for name in ("img", "image_path", "figure", "Image", "IMAGES", "image-path", "imgPath", "pictures")
    ]
    + [{"photo": "a/b.JPG"}, {"xray": ["a.dcm", "b.dcm"]}, {"path": "scan.tiff"}, {"filename": "\u80ba.webp"}]
    + [{"img": ["a.png", "b.png"]}, {"figure": {"path": "a.png"}}, {"image": [], "image_file": "a.png"}]
    + [{"images": 3}, {"images": [{"path": "a.png"}]}, {"images": ["a.png", None]}],
)
def test_an_image_in_a_field_that_is_not_read_is_an_error(fields: dict[str, Any]) -> None:
    field = next(name for name in fields if name != "image")
    with pytest.raises(DataError, match=f"^field '{field}'"):
        from_row(row(("human", "q"), ("gpt", "a"), **fields))


@pytest.mark.parametrize(
    "text",
    ["<img>a.png</img>\nq", "<img src='a.png'> q", "q <IMG>", "<|image|>q", "<image 1> q", "<image_0>", "<Image>\nq"],
)
def test_an_image_mark_of_another_project_is_an_error_without_images(text: str) -> None:
    with pytest.raises(DataError, match="question 1 has an image mark that is not read"):
        from_row(row(("human", "q"), ("gpt", "a"), ("human", text)))
    assert from_row(row(("human", text), image="a.png")).images == ("a.png",)


@pytest.mark.parametrize("text", ["<imaging> q", "a < b and img > c", "<b>q</b>", "image>", "what is an <html> tag?"])
def test_other_angle_brackets_are_text(text: str) -> None:
    assert from_row(row(("human", text))).images == ()


def test_two_fields_with_different_images_are_an_error() -> None:
    with pytest.raises(DataError, match="'image' and 'images' name different images"):
        from_row(row(("human", "q"), image="a.png", images=["a.png", "b.png"]))
