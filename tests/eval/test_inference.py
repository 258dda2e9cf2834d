"""Answer files: order, batches by image, resuming, chunks, failures, the blank image."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava.errors import ConfigError, DataError, GenerationError
from llava.eval.inference import AnswerOptions, AnswerRun, AnswerSummary
from llava.samples import Sample
from tests.support.eval_fakes import FakeEngine, row, rows_of, write_vqa

ROWS = [row(index, f"{index % 3}.png", f"Q{index}?", "yes") for index in range(9)]


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, AnswerOptions]:
    questions, images = write_vqa(tmp_path, ROWS)
    return questions, AnswerOptions(image_folder=images, model_id="fake")


def answer_file(
    engine: FakeEngine,
    questions: Path | list[Sample],
    out: Path,
    *,
    options: AnswerOptions,
    blank_images: bool = False,
    batch_size: int = 64,
    **how: Any,
) -> AnswerSummary:
    """Answer all questions of a file."""
    run = AnswerRun(questions, out, options=replace(options, blank_images=blank_images), **how)
    return run.finish(engine, batch_size=batch_size)


def test_rows_are_in_input_order_though_images_are_batched(data: tuple[Path, AnswerOptions], tmp_path: Path) -> None:
    questions, options = data
    engine, out = FakeEngine({"Q4?": " yes "}), tmp_path / "new" / "answers.jsonl"
    summary = answer_file(engine, questions, out, batch_size=4, options=options)
    rows = rows_of(out)
    assert [answer["question_id"] for answer in rows] == list(range(9))
    assert rows[4]["text"] == "yes" and rows[5]["text"] == "saw 2.png" and rows[5]["metadata"] == {}
    assert engine.questions == [f"Q{index}?" for index in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    assert [len(batch) for batch in engine.batches] == [4, 4, 1]
    assert (summary.num_questions, summary.num_resumed, summary.num_failed) == (9, 0, 0)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("blank_images", [False, True])
@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_equal_evaluations_are_equal_files(
    data: tuple[Path, AnswerOptions], tmp_path: Path, batch_size: int, blank_images: bool, stop_after: int
) -> None:
    """In batches of any size, also after an interruption; another answer has another id."""
    questions, options = data
    outs = [tmp_path / name for name in ("whole.jsonl", "again.jsonl", "other.jsonl")]
    how: dict[str, Any] = {"options": options, "blank_images": blank_images}
    answer_file(FakeEngine(), questions, outs[0], **how)
    if stop_after:
        with pytest.raises(KeyboardInterrupt):
            answer_file(FakeEngine(stop_after=stop_after), questions, outs[1], batch_size=2, **how)
    answer_file(FakeEngine(), questions, outs[1], batch_size=batch_size, **how)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    answer_file(FakeEngine({"Q4?": "no"}), questions, outs[2], **how)
    first, second = ([answer["answer_id"] for answer in rows_of(out)] for out in (outs[0], outs[2]))
    changed = [] if blank_images else [4]  # this engine answers alike about every gray image
    assert [number for number, identity in enumerate(first) if identity != second[number]] == changed


def test_interrupted_run_resumes(data: tuple[Path, AnswerOptions], tmp_path: Path) -> None:
    questions, options = data
    out = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_file(FakeEngine(stop_after=2), questions, out, batch_size=2, options=options)
    assert len(rows_of(out)) == 4
    with out.open("a") as stream:
        stream.write('{"question_id": 7, "prom')
    kept = {answer["question_id"]: answer["answer_id"] for answer in rows_of_complete(out)}
    engine = FakeEngine()
    summary = answer_file(engine, questions, out, batch_size=2, options=options)
    assert summary.num_resumed == 4 and len(engine.questions) == 5
    rows = rows_of(out)
    assert [answer["question_id"] for answer in rows] == list(range(9))
    assert all(rows[identity]["answer_id"] == answer_id for identity, answer_id in kept.items())


def rows_of_complete(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[:-1]]


def test_nothing_left_needs_no_engine(data: tuple[Path, AnswerOptions], tmp_path: Path) -> None:
    questions, options = data
    out = tmp_path / "answers.jsonl"
    answer_file(FakeEngine(), questions, out, options=options)
    run = AnswerRun(questions, out, options=options)
    assert run.pending == []
    assert run.finish(None).num_resumed == 9
    fresh = AnswerRun(questions, tmp_path / "fresh.jsonl", options=options)
    with pytest.raises(ConfigError, match="9 questions are pending"):
        fresh.finish(None)
    with pytest.raises(ConfigError, match="batch-size"):
        fresh.finish(FakeEngine(), batch_size=0)
    engine = FakeEngine()
    answer_file(engine, questions, out, resume=False, options=options)
    assert len(engine.questions) == 9


def test_answers_of_another_run_are_refused(data: tuple[Path, AnswerOptions], tmp_path: Path) -> None:
    questions, options = data
    out = tmp_path / "answers.jsonl"
    answer_file(FakeEngine(), questions, out, options=options)
    with pytest.raises(DataError, match=r"row 0: answered by 'fake', expected 'other'.*--resume False"):
        answer_file(FakeEngine(), questions, out, options=AnswerOptions(options.image_folder, model_id="other"))
    with pytest.raises(DataError, match="another image"):
        answer_file(FakeEngine(), questions, out, blank_images=True, options=options)
    with pytest.raises(DataError, match="not a question of this run"):
        answer_file(FakeEngine(), questions, out, num_chunks=2, options=options)
    changed, _ = write_vqa(tmp_path, [row(0, "0.png", "Another?", "yes"), *ROWS[1:]])
    with pytest.raises(DataError, match="id '0' has another text"):
        answer_file(FakeEngine(), changed, out, options=options)


@pytest.mark.parametrize("num_chunks", [1, 4, 8])
def test_chunks_joined_are_the_whole(data: tuple[Path, AnswerOptions], tmp_path: Path, num_chunks: int) -> None:
    questions, options = data
    rows = []
    for index in range(num_chunks):
        out = tmp_path / f"chunk{index}.jsonl"
        answer_file(FakeEngine(), questions, out, num_chunks=num_chunks, chunk_idx=index, options=options)
        rows += rows_of(out)
    assert [answer["question_id"] for answer in rows] == list(range(9))
    with pytest.raises(ConfigError, match="chunk-idx"):
        answer_file(FakeEngine(), questions, tmp_path / "x", num_chunks=2, chunk_idx=2, options=options)


def test_failures_are_rows_and_are_retried(data: tuple[Path, AnswerOptions], tmp_path: Path) -> None:
    questions, options = data
    Path(options.image_folder, "2.png").unlink()
    out = tmp_path / "answers.jsonl"
    summary = answer_file(FakeEngine(broken="Q4"), questions, out, options=options)
    rows = rows_of(out)
    failed = {answer["question_id"]: answer["metadata"]["error"] for answer in rows if answer["metadata"]}
    assert summary.num_failed == 4 and sorted(failed) == [2, 4, 5, 8]
    assert "told to fail" in failed[4] and "'2.png' is not in the image folder" in failed[5]
    assert all(rows[identity]["text"] == "" for identity in failed)
    engine = FakeEngine()
    again = answer_file(engine, questions, out, options=options)
    assert engine.questions == ["Q4?"] and again.num_failed == 3


def test_nothing_is_scored_where_every_answer_failed(data: tuple[Path, AnswerOptions], tmp_path: Path) -> None:
    questions, options = data
    out = tmp_path / "answers.jsonl"
    with pytest.raises(GenerationError, match="all 9 answers failed, the first with: the fake engine was told to fail"):
        answer_file(FakeEngine(broken="Q"), questions, out, options=options)
    assert len(rows_of(out)) == 9 and all(answer["metadata"]["error"] for answer in rows_of(out))
    assert answer_file(FakeEngine(), questions, out, options=options).num_failed == 0


def test_rows_without_text_are_answered_again(data: tuple[Path, AnswerOptions], tmp_path: Path) -> None:
    questions, options = data
    out = tmp_path / "answers.jsonl"
    answer_file(FakeEngine(), questions, out, options=options)
    rows = rows_of(out)
    rows[4]["text"] = None
    out.write_text("".join(json.dumps(answer) + "\n" for answer in rows))
    engine = FakeEngine()
    answer_file(engine, questions, out, options=options)
    assert engine.questions == ["Q4?"] and rows_of(out)[4]["text"] == "saw 1.png"


def test_image_outside_the_folder_is_not_opened(tmp_path: Path) -> None:
    questions, images = write_vqa(tmp_path, [row(1, "a.png", "Q?", "yes")])
    (images / "a.png").rename(tmp_path / "secret.png")
    questions.write_text(json.dumps([row(1, "../secret.png", "Q?", "yes")]))
    engine, out = FakeEngine(), tmp_path / "answers.jsonl"
    with pytest.raises(GenerationError, match=r"all 1 answers failed, the first with: image '\.\./secret\.png' leads"):
        answer_file(engine, questions, out, options=AnswerOptions(image_folder=images))
    assert engine.questions == [] and "outside the image folder" in rows_of(out)[0]["metadata"]["error"]


def test_blank_images(data: tuple[Path, AnswerOptions], tmp_path: Path) -> None:
    questions, options = data
    engine, out = FakeEngine(), tmp_path / "blank.jsonl"
    answer_file(engine, questions, out, blank_images=True, options=options)
    shown = {id(prompt.images[0]) for batch in engine.batches for prompt in batch}
    assert len(shown) == 1
    assert engine.batches[0][0].images[0].getcolors() == [(336 * 336, (127, 127, 127))]
    assert {answer["text"] for answer in rows_of(out)} == {"no"}
    assert rows_of(out)[0]["metadata"] == {"image": "blank"}


def test_answer_prompter_joins_two_answers(data: tuple[Path, AnswerOptions], tmp_path: Path) -> None:
    questions, options = data
    engine, out = FakeEngine({"Q0?": "It looks well.", "ANSWER:": "yes"}), tmp_path / "answers.jsonl"
    prompter = AnswerOptions(options.image_folder, model_id="fake", answer_prompter=True)
    answer_file(engine, questions, out, options=prompter)
    assert rows_of(out)[0]["text"] == "It looks well.\n The answer is yes"
    assert [turn.role for turn in engine.batches[1][0].conversation.turns] == ["human", "gpt", "human"]


def test_chat_questions_and_ids(tmp_path: Path) -> None:
    _, images = write_vqa(tmp_path, [row(1, "a.png", "Q?", "yes")])
    questions = tmp_path / "qa.jsonl"
    chat = [{"question_id": index, "image": "a.png", "text": f"What {index}?\n<image>"} for index in (4, 0)]
    questions.write_text("\n".join(map(json.dumps, chat)))
    out = tmp_path / "answers.jsonl"
    answer_file(FakeEngine(), questions, out, options=AnswerOptions(image_folder=images, form="raw"))
    assert [(answer["question_id"], answer["prompt"]) for answer in rows_of(out)] == [
        (4, "What 4?\n<image>"),
        (0, "What 0?\n<image>"),
    ]


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    questions, images = write_vqa(tmp_path, [row("1", "a.png", "Q?", "yes"), row(1, "a.png", "P?", "yes")])
    with pytest.raises(DataError, match="'1' occurs twice"):
        answer_file(FakeEngine(), questions, tmp_path / "out", options=AnswerOptions(image_folder=images))
