"""Preference rows of every layout: read, written and read again, and rows that cannot be compared."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.preference_formats import PREFERENCE_WRITERS, layout_of_row, read_preference
from llava.errors import DataError
from llava.samples import Conversation, Preference, Turn

QUESTION = "<image>\nWhat is shown?"


def turns(*texts: str) -> Conversation:
    return Conversation(tuple(Turn("gpt" if number % 2 else "human", text) for number, text in enumerate(texts)))


PAIR = Preference("7", turns(QUESTION, "A chest."), turns(QUESTION, "A hand."), ("a.png",))

HUMAN = {"from": "human", "value": QUESTION}
ROWS: dict[str, dict[str, Any]] = {
    "published": {
        "id": 7,
        "image": "a.png",
        "chosen_conversations": [HUMAN, {"from": "gpt", "value": "A chest."}],
        "reject_conversations": [HUMAN, {"from": "gpt", "value": "A hand."}],
    },
    "judge": {"id": "7", "q": QUESTION, "img": "a.png", "p": "A chest.", "r": "A hand."},
    "trl": {"id": "7", "prompt": QUESTION, "chosen": "A chest.", "rejected": "A hand.", "images": ["a.png"]},
    "trl of messages": {
        "id": "7",
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A chest."}]}],
        "rejected": [{"role": "assistant", "content": "A hand."}],
        "image": {"path": "a.png"},
    },
    "trl without a prompt": {
        "id": "7",
        "chosen": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A chest."}],
        "rejected": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A hand."}],
        "images": ["a.png"],
    },
    "llama-factory": {
        "id": "7",
        "conversations": [HUMAN],
        "chosen": {"from": "gpt", "value": "A chest."},
        "rejected": {"from": "gpt", "value": "A hand."},
        "images": ["a.png"],
    },
    "llama-factory with instructions": {
        "id": "7", "instruction": "<image>", "input": "What is shown?", "chosen": "A chest.", "rejected": "A hand.",
        "images": ["a.png"],
    },
    "ms-swift": {
        "id": "7",
        "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A chest."}],
        "rejected_response": "A hand.",
        "images": ["a.png"],
    },
    "ms-swift with messages": {
        "id": "7",
        "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A chest."}],
        "rejected_messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A hand."}],
        "images": [{"path": "a.png"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_row_of_a_known_layout(name: str) -> None:
    found = read_preference(ROWS[name], default_id="0")
    assert found == PAIR


@pytest.mark.parametrize("name", ROWS)
def test_layout_is_recognized_by_its_fields(name: str) -> None:
    assert layout_of_row(ROWS[name]) == name.partition(" ")[0]


WORDS = st.text(st.sampled_from("ab 1.\n"), min_size=1).filter(lambda text: bool(text.strip()))


@pytest.mark.parametrize("layout", PREFERENCE_WRITERS)
@given(question=WORDS, answers=st.tuples(WORDS, WORDS), weight=st.sampled_from([1.0, 0.25]), shown=st.booleans())
def test_written_rows_are_read_back(
    layout: str, question: str, answers: tuple[str, str], weight: float, shown: bool
) -> None:
    if answers[0].strip() == answers[1].strip():
        return
    question = question.strip()
    text = f"<image>\n{question}" if shown else question
    images = ("a.png",) if shown else ()
    pair = Preference("x", turns(text, answers[0]), turns(text, answers[1]), images, weight, {"judge": "me"})
    assert read_preference(PREFERENCE_WRITERS[layout](pair), default_id="0") == pair


@pytest.mark.parametrize("layout", ["published", "trl", "ms-swift"])
def test_pairs_of_several_turns_and_a_system_prompt(layout: str) -> None:
    chosen, rejected = turns("Q", "A", "R", "B"), turns("Q", "C", "R", "D")
    sides = (Conversation(side.turns, "Be brief.") for side in (chosen, rejected))
    pair = Preference("x", *sides)
    assert read_preference(PREFERENCE_WRITERS[layout](pair), default_id="0") == pair


@pytest.mark.parametrize("layout", ["judge", "llama-factory"])
def test_layouts_that_cannot_hold_several_answers_say_so(layout: str) -> None:
    pair = Preference("x", turns("Q", "A", "R", "B"), turns("Q", "C", "R", "D"))
    with pytest.raises(DataError, match="use --to published, trl or ms-swift"):
        PREFERENCE_WRITERS[layout](pair)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chosen": ""}, "the chosen side has an empty answer"),
        ({"rejected": " \n"}, "the rejected side has an empty answer"),
        ({"rejected": " A chest. "}, "the chosen and the rejected answer are equal"),
        ({"chosen": None}, "field 'chosen' must be text or a list"),
        ({"chosen": [{"role": "nurse", "content": "x"}]}, r"chosen\[0\] must have a role"),
        ({"chosen": [{"role": "assistant", "content": 5}]}, r"chosen\[0\] must have text"),
        ({"chosen": []}, "the chosen side ends with a question"),
        ({"prompt": ["x"]}, r"prompt\[0\] must have a role"),
        ({"weight": -1}, "field 'weight' must be a number of at least 0"),
        ({"weight": float("nan")}, "field 'weight'"),
        ({"weight": "2"}, "field 'weight'"),
        ({"images": [5]}, "field 'images' must hold file names"),
    ],
)
def test_rows_that_cannot_be_used(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_preference({**ROWS["trl"], **changed}, default_id="0")


def test_sides_with_other_questions() -> None:
    row = ROWS["published"] | {
        "reject_conversations": [{"from": "human", "value": "Else?"}, {"from": "gpt", "value": "B"}]
    }
    with pytest.raises(DataError, match="different questions"):
        read_preference(row, default_id="0")


def test_sides_with_other_images() -> None:
    with pytest.raises(DataError, match="different images"):
        read_preference({**ROWS["ms-swift"], "rejected_images": ["b.png"]}, default_id="0")


def test_no_answer_text_is_repeated() -> None:
    row = {**ROWS["trl"], "chosen": {"text": "Jane Roe has pneumonia"}}
    with pytest.raises(DataError) as caught:
        read_preference(row, default_id="0")
    assert "Roe" not in str(caught.value)


@pytest.mark.parametrize("row", [{}, {"id": "1", "conversations": []}, {"chosen": "a"}, [1], "text"])
def test_rows_of_no_known_layout(row: Any) -> None:
    with pytest.raises(DataError, match=r"not a preference row|must be a JSON object"):
        read_preference(row, default_id="0")
