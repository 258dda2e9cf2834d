"""Predictions of findings: rows, repeated ids, resume, chunks and their join."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.data.records import load_samples
from llava.errors import ConfigError, DataError, GenerationError
from llava.eval import findings_run
from llava.eval.inference import AnswerOptions, AnswerRun
from llava.eval.row_forms import FindingsRows
from llava.generation.protocol import Completion, Prompt, Sampling
from tests.support.eval_fakes import FakeEngine, rows_of

NAN = float("nan")


def annotation(number: int, **changed: Any) -> dict[str, Any]:
    """Return a row of an annotation file; every second study has two images, so ids repeat."""
    row = {
        "id": f"{number // 2}_5{number // 4}",
        "image": f"mimic/p1/{number}.png",
        "generate_method": "rule-based",
        "reason": ["cough", None, NAN, "  "][number % 4],
        "view": "AP" if number % 2 else "PA",
        "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": f"Findings {number}."}],
    }
    return {**row, **changed}


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    """Twelve rows, nine of which the test loader keeps; with their images."""
    rows = [annotation(number) for number in range(9)]
    rows += [annotation(9, view="LATERAL"), annotation(10, generate_method="gpt4"), annotation(11, view=NAN)]
    (tmp_path / "files" / "p1").mkdir(parents=True)
    for number in range(12):
        Image.new("L", (20, 20), 20 * number).save(tmp_path / "files" / "p1" / f"{number}.png")
    path = tmp_path / "chat_test.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Engine of every run of this module, instead of a model."""
    fake = FakeEngine()
    monkeypatch.setattr(findings_run, "engine_of", lambda args: fake)
    monkeypatch.setattr(findings_run, "model_settings", lambda args: {"weights": args.model})
    return fake


def arguments(queries: Path, out: Path, *more: str) -> Namespace:
    words = ["--query_file", str(queries), "--loader", "mimic_test_findings", "--prediction_file", str(out)]
    words += ["--image_folder", str(queries.parent / "files"), "--model_path", "model", "--conv_mode", "v1"]
    return findings_run.make_parser().parse_args([*words, *more])


def test_rows_have_the_published_keys_first_and_repeat_ids(queries: Path, engine: FakeEngine) -> None:
    out = queries.parent / "test.jsonl"
    findings_run.run_findings(arguments(queries, out))
    rows = rows_of(out)
    assert list(rows[0]) == [
        *("id", "query", "reference", "prediction"),
        *("index", "image", "view", "generate_method", "num_new_tokens", "stop_reason"),
    ]
    assert [row["index"] for row in rows] == list(range(9)) and len({row["id"] for row in rows}) == 5
    assert rows[0]["query"].endswith("given the following indication: cough")
    assert rows[1]["query"] == "<image>\nProvide a description of the findings in the radiology image."
    assert (rows[3]["prediction"], rows[3]["reference"], rows[3]["view"]) == ("saw 3.png", "Findings 3.", "AP")
    assert engine.batches[0][0].conversation.turns[0].text == rows[0]["query"]
    assert [len(batch) for batch in engine.batches] == [8, 1]


def test_every_published_flag(queries: Path) -> None:
    words = "--load_8bit --load_4bit False --device cpu --temperature 0.2 --top_p 0.9 --num_beams 2 --chunk_idx 0"
    words += " --num_chunks 1 --batch_size 4 --group_by_length --model_base base --load-4bit False"
    args = arguments(queries, queries, *words.split())
    assert args.load_8bit and not args.load_4bit and args.group_by_length and args.num_beams == 2
    defaults = arguments(queries, queries)
    assert (defaults.temperature, defaults.batch_size, defaults.num_chunks, defaults.chunk_idx) == (0.0, 8, 1, 0)
    assert findings_run.sampling_of(defaults, max_new_tokens=findings_run.MAX_NEW_TOKENS).max_new_tokens == 256


def test_short_prompts_come_first_and_the_file_keeps_its_order(queries: Path, engine: FakeEngine) -> None:
    out = queries.parent / "test.jsonl"
    findings_run.run_findings(arguments(queries, out, "--group_by_length", "--batch_size", "100"))
    lengths = [len(question) for question in engine.questions]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    assert [row["index"] for row in rows_of(out)] == list(range(9))


def test_a_stopped_run_resumes(queries: Path, engine: FakeEngine) -> None:
    whole, out = queries.parent / "whole.jsonl", queries.parent / "test.jsonl"
    findings_run.run_findings(arguments(queries, whole))
    engine.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        findings_run.run_findings(arguments(queries, out, "--batch_size", "2"))
    with open(out, "a") as stream:
        stream.write('{"id": "0_50", "que')  # a line that a kill left unfinished
    engine.stop_after = -1
    summary = findings_run.run_findings(arguments(queries, out, "--batch_size", "2"))
    assert summary.num_resumed == 4 and out.read_bytes() == whole.read_bytes()


def test_rows_of_other_questions_are_refused(queries: Path, engine: FakeEngine) -> None:
    out = queries.parent / "test.jsonl"
    findings_run.run_findings(arguments(queries, out))
    rows = json.loads(queries.read_text())
    rows[2]["reason"] = "fever"
    queries.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="row 2: row 2 of the questions has another text"):
        findings_run.run_findings(arguments(queries, out))


def test_a_failed_row_ends_with_an_error_and_is_asked_again(queries: Path, engine: FakeEngine) -> None:
    out, image = queries.parent / "test.jsonl", queries.parent / "files" / "p1" / "4.png"
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(GenerationError, match="1 of 9 rows failed"):
        findings_run.run_findings(arguments(queries, out))
    assert rows_of(out)[4]["stop_reason"] == "error" and rows_of(out)[4]["prediction"] == ""
    image.write_bytes(content)
    summary = findings_run.run_findings(arguments(queries, out))
    assert summary.num_resumed == 8 and rows_of(out)[4]["prediction"] == "saw 4.png"


class CutEngine(FakeEngine):
    """Engine whose answers all reach the token limit."""

    def complete(self, prompt: Prompt) -> Completion:
        return Completion("cut", tuple(range(7)), "length")


def test_the_share_of_cut_predictions_is_said(queries: Path, caplog: pytest.LogCaptureFixture, engine: Any) -> None:
    samples = load_samples(queries, loader="mimic_test_findings")[:1]
    options = AnswerOptions(image_folder=queries.parent / "files", sampling=Sampling(max_new_tokens=7), form="raw")
    asked = [type(samples[0])("0", samples[0].conversation, samples[0].images, {"id": 0})]
    run = AnswerRun(asked, queries.parent / "cut.jsonl", options=options, row_form=FindingsRows(samples))
    findings_run._report(run.finish(CutEngine()), 7)
    assert "1 of 1 new predictions (100.0 %) were cut at --max-new-tokens 7" in caplog.text
    [row] = rows_of(queries.parent / "cut.jsonl")
    assert (row["num_new_tokens"], row["stop_reason"]) == (7, "length")


@pytest.mark.parametrize("num_chunks", [1, 2, 4, 9, 12])
def test_joined_chunks_equal_one_run(queries: Path, engine: FakeEngine, num_chunks: int) -> None:
    whole, folder = queries.parent / "whole.jsonl", queries.parent / "chunks"
    findings_run.run_findings(arguments(queries, whole))
    folder.mkdir()
    for index in range(num_chunks):
        words = ["--num_chunks", str(num_chunks), "--chunk_idx", str(index)]
        findings_run.run_findings(arguments(queries, folder / f"test_{index}.jsonl", *words))
    assert findings_run.join_chunks(folder, num_chunks, folder / "all.jsonl") == 9
    assert (folder / "all.jsonl").read_bytes() == whole.read_bytes()


@pytest.fixture
def two_chunks(queries: Path, engine: FakeEngine) -> Path:
    folder = queries.parent / "chunks"
    folder.mkdir()
    for index in "01":
        words = ["--num_chunks", "2", "--chunk_idx", index]
        findings_run.run_findings(arguments(queries, folder / f"test_{index}.jsonl", *words))
    return folder


def test_chunks_of_another_division_are_refused(two_chunks: Path) -> None:
    with pytest.raises(ConfigError, match=r"test_0\.jsonl is chunk 0 of 2 chunks of an earlier run.*has 3"):
        findings_run.check_chunks(two_chunks, 3)
    with pytest.raises(ConfigError, match=r"test_0\.jsonl is chunk 0 of 2 chunks"):
        findings_run.check_chunks(two_chunks, 1)
    (two_chunks / "test_7.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"test_7\.jsonl is chunk 7 of an earlier run"):
        findings_run.check_chunks(two_chunks, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: rows[:-1], r"no prediction for 1 rows \(index 8\) of 9"),
        (lambda rows: [*rows, rows[0]], "row 4: index 5 occurs twice"),
        (lambda rows: [{**rows[0], "index": None}], "expected field 'index', a number, got None"),
        (lambda rows: [{**rows[0], "error": "no file"}], "the row failed: no file"),
        (lambda rows: [*rows, {**rows[0], "index": 44}], r"predictions for 1 rows \(index 44\)"),
    ],
)
def test_a_join_checks_each_index_once(two_chunks: Path, damage: Any, message: str) -> None:
    part = two_chunks / "test_1.jsonl"
    rows = damage(rows_of(part))
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        findings_run.join_chunks(two_chunks, 2, two_chunks / "all.jsonl")
    assert not (two_chunks / "all.jsonl").exists()


def test_a_missing_chunk_is_named(two_chunks: Path) -> None:
    (two_chunks / "test_1.jsonl").unlink()
    with pytest.raises(DataError, match=r"test_1\.jsonl is missing"):
        findings_run.join_chunks(two_chunks, 2, two_chunks / "all.jsonl")
