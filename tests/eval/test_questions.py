"""Questions and the rows of their answers."""

from __future__ import annotations

import pytest

from llava.errors import DataError
from llava.eval import questions
from llava.samples import from_row
from tests.support.eval_fakes import row


def test_forms_of_the_prompt() -> None:
    sample = from_row(row(3, "a.png", "Is it?", "Yes"))
    assert questions.question_of(sample, form="raw").prompt == "Is it?\n<image>"
    assert questions.question_of(sample, form="tagged").prompt == "Is it?\n<image>"
    assert questions.question_of(sample, form="plain").prompt == "Is it?"
    asked = questions.question_of(sample)
    assert asked.raw_id == 3 and asked.id == "3"
    assert [turn.role for turn in asked.conversation.turns] == ["human"]


def test_placeholder_is_added_when_missing_and_counted() -> None:
    data = row(1, "a.png", "Is it?", "yes")
    data["conversations"][0]["value"] = "Is it?"
    assert questions.question_of(from_row(data)).conversation.turns[0].text == "<image>\nIs it?"
    data["conversations"][0]["value"] = "<image><image>Is it?"
    with pytest.raises(DataError, match="id '1': 2 <image> placeholders for 1 images"):
        questions.question_of(from_row(data))
    text_only = {**data, "conversations": [{"from": "human", "value": "Is it?"}]}
    del text_only["image"]
    assert questions.question_of(from_row(text_only)).prompt == "Is it?"


def test_options_only_after_closed_yes_no_questions() -> None:
    closed = questions.question_of(from_row(row(1, "a.png", "Is it?", "No.")), options=True)
    assert (
        closed.conversation.turns[0].text == "Is it? Please choose from the following two options: [yes, no]\n<image>"
    )
    assert closed.prompt == "Is it? Please choose from the following two options: [yes, no]\n<image>"
    for sample in (row(1, "a.png", "Where?", "left"), row(1, "a.png", "Is it?", "yes", kind="OPEN")):
        assert "options" not in questions.question_of(from_row(sample), options=True).prompt


def test_answer_row_has_the_six_keys_in_order() -> None:
    asked = questions.question_of(from_row(row(3, "a.png", "Is it?", "Yes")))
    answer = questions.answer_row(asked, "no", model_id="m", metadata={})
    assert list(answer) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert answer["question_id"] == 3
    ids = {questions.short_id() for _ in range(100)}
    assert len(ids) == 100 and all(len(identity) == 22 and identity.isalnum() for identity in ids)
