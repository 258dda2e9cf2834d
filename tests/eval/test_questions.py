"""Questions and the rows of their answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava.errors import DataError
from llava.eval import questions
from llava.samples import Origin, from_row
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


ANSWERS = [{"question_id": number, "text": str(number)} for number in (2, 1)]


def test_answers_come_in_the_order_of_the_ids() -> None:
    assert [answer["text"] for answer in questions.match_answers(["1", "2"], ANSWERS)] == ["1", "2"]


@pytest.mark.parametrize(
    ("ids", "answers", "expected"),
    [
        (["1", "2", "3"], ANSWERS, r"1 ids \(3\) without an answer, 0 ids answered"),
        (["1"], ANSWERS, r"0 ids without an answer, 1 ids \(2\) answered but not in the ground truth"),
        (["3"], ANSWERS, r"1 ids \(3\) without an answer, 2 ids \(1, 2\) answered"),
        (["1", "2"], [*ANSWERS, ANSWERS[0]], r"ids must be unique, but 1 ids \(2\) occur more than once"),
        (["1", "2"], [*ANSWERS, {"question_id": "1", "text": ""}], r"ids must be unique, but 1 ids \(1\) occur"),
        ([], [*ANSWERS, *ANSWERS], r"but 2 ids \(2, 1\) occur more than once"),
    ],
)
def test_other_or_repeated_ids_are_refused(ids: list[str], answers: list[dict], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        questions.match_answers(ids, answers)


def test_answer_ids_are_derived_from_the_answer() -> None:
    asked = questions.question_of(from_row(row(3, "a.png", "Is it?", "Yes")))
    other = questions.question_of(from_row(row("3", "a.png", "Is it?", "Yes")))
    variants = [
        (asked, "no", "m", {}),
        (other, "no", "m", {}),
        (asked, "no.", "m", {}),
        (asked, "no", "m2", {}),
        (asked, "no", "m", {"image": "blank"}),
        (asked, "\ud83d", "m", {}),
    ]
    ids = [
        [
            questions.answer_row(one, text, model_id=model, metadata=meta)["answer_id"]
            for one, text, model, meta in variants
        ]
        for _ in range(2)
    ]
    assert ids[0] == ids[1] and len(set(ids[0])) == len(variants)
    assert all(len(identity) == 22 and identity.isalnum() for identity in ids[0])


@pytest.mark.parametrize(
    ("texts", "images", "asked", "shown"),
    [
        (["<image>\nfirst?", "yes", "<image>\nsecond?", "no"], ["0", "1"], "<image>\nfirst?", ("0",)),
        (["A <image> and <image>?", "yes", "<image>?", "no"], ["0", "1", "2"], "A <image> and <image>?", ("0", "1")),
        (["first?", "yes", "<image>\nsecond?", "no"], ["0"], "first?", ()),
        (["first?", "yes", "second?", "no"], ["0", "1"], "<image>\n<image>\nfirst?", ("0", "1")),
        (["first?", "see <image>", "second?", "no"], ["0"], "first?", ()),
        (["<image>", "yes", "a?", "b", "<image><image>", "no"], ["0", "1", "2"], "<image>", ("0",)),
    ],
)
def test_first_question_has_its_own_images(texts: list[str], images: list[str], asked: str, shown: tuple) -> None:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    question = questions.question_of(from_row({"id": "m", "image": images, "conversations": turns}))
    assert question.conversation.turns[0].text == asked and question.images == shown


def test_other_numbers_of_images_are_refused_with_file_and_row() -> None:
    sample = from_row(row(1, "a.png", "<image> Is it <image>?", "yes"))
    with pytest.raises(DataError, match=r"^test\.json, row 4, id '1': \d <image> placeholders for 1 images"):
        questions.question_of(replace(sample, origin=Origin("test.json", 4)))
