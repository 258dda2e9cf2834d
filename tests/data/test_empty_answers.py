"""Answers without text are not trained; rows without another answer are left out and counted."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava.api import LlavaPredictor
from llava.constants import IGNORE_INDEX
from llava.conversation import TEMPLATES
from llava.data.encode import encode, num_learned
from llava.data.image_store import ImageIndex
from llava.data.validate import Checked, check_trainable
from llava.errors import ConfigError, DataError
from llava.model.builder import LoadedModel
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Origin, Sample, Turn
from tests.support.check_files import check_rows
from tests.support.generation_tools import engine_of
from tests.support.runs import arguments, metrics, steps, train
from tests.support.text_tools import make_processor, talk

EMPTY = ["", " ", "\n", "\t \r\n", "\N{NO-BREAK SPACE}", "\N{EM SPACE} \N{LINE SEPARATOR}"]


@pytest.fixture(scope="module")
def processor() -> LlavaMedProcessor:
    return make_processor()


def trained_text(conversation: Conversation, processor: LlavaMedProcessor) -> str:
    encoded = encode(conversation, processor, max_length=None)
    return str(processor.tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX]))


@pytest.mark.parametrize("text", EMPTY, ids=repr)
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_no_token_of_a_row_with_an_empty_answer_is_trained(processor: LlavaMedProcessor, name: str, text: str) -> None:
    processor = processor.changed(template=name)
    conversation = talk("What is seen?", text)
    assert conversation.has_only_empty_answers
    assert set(encode(conversation, processor, max_length=None).labels) == {IGNORE_INDEX}


def trained_by_turn(conversation: Conversation, processor: LlavaMedProcessor) -> Counter[int]:
    """Return the number of trained tokens of each turn."""
    encoded = encode(conversation, processor, max_length=None)
    return Counter(turn for turn, label in zip(encoded.turns, encoded.labels, strict=True) if label != IGNORE_INDEX)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_other_answers_of_a_row_are_trained(processor: LlavaMedProcessor, name: str, place: int) -> None:
    """With as many tokens as in a row without an empty answer."""
    processor = processor.changed(template=name)
    answers = ["first", "second", "third"]
    full = trained_by_turn(talk(*(text for answer in answers for text in ("Q?", answer))), processor)
    answers[place] = " "
    conversation = talk(*(text for answer in answers for text in ("Q?", answer)))
    found = trained_by_turn(conversation, processor)
    assert not conversation.has_only_empty_answers and conversation.num_empty_answers == 1
    assert {turn: found[turn] for turn in (1, 3, 5)} == {**{t: full[t] for t in (1, 3, 5)}, 2 * place + 1: 0}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_mark_that_ends_an_empty_answer_is_not_trained(processor: LlavaMedProcessor, place: int) -> None:
    """In the ### templates it belongs to the next question, or closes the row."""
    processor = processor.changed(template="v0")
    answers = ["first", "second", "third"]
    answers[place] = ""
    text = trained_text(talk(*(text for answer in answers for text in ("Q?", answer))), processor)
    assert text.count("###") == 5, "before the first question, and before and after each of two answers"


@pytest.mark.parametrize("text", EMPTY, ids=repr)
def test_a_flag_of_the_turn_decides_first(processor: LlavaMedProcessor, text: str) -> None:
    processor = processor.changed(template="v1")
    turns = (Turn("human", "Q?"), Turn("gpt", text, train=True))
    assert trained_text(Conversation(turns), processor).endswith("</s>")
    assert not Conversation(turns).num_empty_answers


@pytest.mark.parametrize("name", ["v1", "v0", "plain", "chatml", "llama_2", "mistral_instruct"])
def test_the_name_of_the_table_trains_them(name: str) -> None:
    processor = make_processor().changed(template=name, trains_empty=True)
    encoded = encode(talk("Q?", ""), processor, max_length=None)
    assert num_learned(encoded, talk("Q?", "")) > 0


def sample(number: int, *texts: str) -> Sample:
    return Sample(f"s{number}", talk(*texts), origin=Origin("train.json", number))


def check(samples: list[Sample], loaded: LoadedModel, folder: Path, **options: Any) -> Checked:
    return check_trainable(samples, folder, loaded.processor, index=ImageIndex(folder), **options)


@pytest.mark.parametrize("template", ["v1", "v0", "plain", "chatml", "mistral_instruct"])
def test_rows_of_empty_answers_are_left_out_and_counted(
    tiny: LoadedModel, tmp_path: Path, template: str, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = replace(tiny, processor=tiny.processor.changed(template=template))
    rows = [sample(0, "Q?", "yes"), *(sample(1 + n, "Q?", text) for n, text in enumerate(EMPTY))]
    rows += [sample(8, "Q?", "", "R?", ""), sample(9, "Q?", "", "R?", "no")]
    with caplog.at_level(logging.WARNING):
        found = check(rows, tiny, tmp_path)
    assert [one.id for one in found.samples] == ["s0", "s9"] and not found.bad
    assert (found.num_left_out, found.num_empty) == (7, 1)
    assert (
        "7 of 9 rows are left out, since their answers are empty (the first: train.json, row 1, id 's1')" in caplog.text
    )
    assert "1 empty answers in the other rows are not trained" in caplog.text
    tiny = replace(tiny, processor=tiny.processor.changed(trains_empty=True))
    assert len(check(rows, tiny, tmp_path).samples) == len(rows)


@pytest.mark.parametrize("text", EMPTY, ids=repr)
def test_a_file_of_nothing_else_is_an_error(tiny: LoadedModel, tmp_path: Path, text: str) -> None:
    rows = [sample(0, "Q?", text), sample(1, "Q?", text, "R?", text)]
    with pytest.raises(
        DataError, match="none of the 2 rows can be used for training; 2 have empty answers only"
    ) as error:
        check(rows, tiny, tmp_path)
    assert "train.json, row 0" in str(error.value) and "--compat empty_answers" in str(error.value)


@pytest.mark.parametrize("turns", [
    (Turn("human", "Q?"),),
    (Turn("human", "Q?"), Turn("gpt", "A", train=False)),
    (Turn("human", "Q?"), Turn("gpt", "", train=False)),
    (Turn("human", "Q " * 400), Turn("gpt", "A")),
    (Turn("human", "Q?"), Turn("gpt", ""), Turn("human", "Q " * 400), Turn("gpt", "A")),
])  # fmt: skip
@pytest.mark.parametrize("template", ["v1", "v0", "chatml", "llama_2", "mistral_instruct"])
def test_rows_without_anything_to_learn_are_errors(
    tiny: LoadedModel, tmp_path: Path, template: str, turns: tuple[Turn, ...]
) -> None:
    """Also in the ### templates, where the mark before a question is trained."""
    tiny = replace(tiny, processor=tiny.processor.changed(template=template))
    row = Sample("a", Conversation(turns), origin=Origin("train.json", 1))
    with pytest.raises(DataError, match="no token is left to train"):
        check([sample(0, "Q?", "A"), row], tiny, tmp_path, max_length=600)


def write(path: Path, *answers: str) -> Path:
    rows = [
        {"id": str(n), "conversations": [{"from": "human", "value": f"Q {n}?"}, {"from": "gpt", "value": answer}]}
        for n, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_leaves_them_out_unless_named(parts: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", "yes", "", " ", "no", "\n", "a b")
    words = {"data_path": data, "per_device_train_batch_size": 1}
    train(arguments(parts, tmp_path / "default", **words))
    assert steps(tmp_path / "default") == [1, 2, 3]
    train(arguments(parts, tmp_path / "named", **words, compat="empty_answers"))
    assert steps(tmp_path / "named") == [1, 2, 3, 4, 5, 6]


def test_a_run_that_trained_them_is_not_resumed_without(parts: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", "yes", "no")
    words = {"data_path": data, "save_strategy": "epoch"}
    train(arguments(parts, tmp_path / "run", **words, train_empty_answers=True))
    with pytest.raises(ConfigError, match="its run had --train-empty-answers True, this run has False"):
        train(arguments(parts, tmp_path / "run", **words, num_train_epochs=2))


def test_a_stream_leaves_them_out_and_counts(parts: Path, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", "yes", "", " ", "no", "\n", "a b")
    (tmp_path / "stream.yaml").write_text("stream: true\nsources: [{name: lines, path: rows.jsonl}]\n")
    words = {
        "data_path": tmp_path / "stream.yaml",
        "image_folder": None,
        "max_steps": 3,
        "per_device_train_batch_size": 1,
    }
    train(arguments(parts, tmp_path / "run", **words))
    assert steps(tmp_path / "run") == [1, 2, 3]
    train(arguments(parts, tmp_path / "longer", **{**words, "max_steps": 6}))
    assert [line["skipped_rows"] for line in metrics(tmp_path / "longer") if "skipped_rows" in line][-1] >= 3
    write(tmp_path / "rows.jsonl", "", " ")
    with pytest.raises(DataError, match="the answers are empty; expected at least one with text"):
        train(arguments(parts, tmp_path / "none", **words))


TURN = {"from": "human", "value": "Q?"}


def row(number: int, *answers: str) -> dict[str, Any]:
    turns = [part for answer in answers for part in (TURN, {"from": "gpt", "value": answer})]
    return {"id": str(number), "conversations": turns}


@pytest.mark.parametrize("text", EMPTY, ids=repr)
def test_the_check_warns_and_refuses_a_file_of_nothing_else(tmp_path: Path, text: str) -> None:
    found = check_rows(tmp_path, [row(0, "yes"), row(1, text), row(2, text, "no"), row(3, text, text + " ")])
    assert found["only-empty-answers"] == [1, 3] and found["empty-answer"] == [2]
    assert "nothing-trained" not in found
    assert "nothing-trained" in check_rows(tmp_path, [row(0, text), row(1, text, text)])


def test_an_empty_answer_still_has_a_score(tiny: LoadedModel) -> None:
    score = LlavaPredictor(engine_of(tiny)).score("Is it red?", "")
    assert score.num_tokens >= 1 and score.logprob < 0
