"""`llava eval` with a fake engine: result, page, control, resuming, comparison."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava.data.records import load_samples
from llava.errors import CheckpointError, ConfigError, DataError
from llava.eval import run
from llava.eval.inference import AnswerOptions
from llava.eval.task_files import read_tasks
from tests.support.eval_fakes import FakeEngine, row, rows_of, write_vqa

EVIL = "<script>alert('x')</script>"


def make_plan(tmp_path: Path, **changes: object) -> run.EvaluationPlan:
    rows = [
        row(
            index,
            f"{index % 5}.png",
            f"Is {index} so {EVIL}?",
            "yes" if index % 2 else "no",
            types="PRES" if index < 10 else "POS",
        )
        for index in range(20)
    ]
    rows += [row(f"o{index}", f"{index}.png", f"What {index}?", f"saw {index}.png", kind="OPEN") for index in range(5)]
    data, images = write_vqa(tmp_path, rows)
    plan = run.EvaluationPlan(
        load_samples(data), tmp_path / "out", AnswerOptions(image_folder=images, model_id="fake"), num_resamples=50
    )
    return replace(plan, **changes)


def good_engine() -> FakeEngine:
    return FakeEngine({f"Is {index} so {EVIL}?": "Yes." if index % 2 else "No." for index in range(20)})


def test_result_and_page(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    report = run.evaluate_model(plan, good_engine)
    assert json.loads((plan.out / run.RESULTS).read_text()) == json.loads(json.dumps(report))
    strict = report["scores"]["strict"]
    assert strict["closed accuracy"]["answered"]["value"] == 100.0
    assert strict["closed accuracy"]["blank"]["value"] == 50.0
    assert strict["closed accuracy"]["from_picture"]["low"] > 0
    assert strict["open recall"]["from_picture"]["value"] == 100.0
    assert report["majority"] == {"source": "test answers", "closed": "no", "open": report["majority"]["open"]}
    assert {entry["type"] for entry in report["by_type"]} == {"PRES", "POS"}
    assert {"git_commit", "command", "time", "llava_version"} <= report["provenance"].keys()
    page = (plan.out / run.PAGE).read_text()
    assert EVIL not in page and "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 25
    assert "http" not in page.replace("http-equiv", "")


def test_training_rows_give_majority_and_candidates(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    train = [sample for sample in plan.samples if sample.id in {"1", "3", "o2"}]
    report = run.evaluate_model(replace(plan, train_samples=train, blank_control=False), good_engine)
    assert report["majority"] == {"source": "training answers", "closed": "yes", "open": "saw 2png"}
    assert report["scores"]["strict"]["closed accuracy"]["majority"] == 50.0
    assert "open accuracy" in report["scores"]["legacy run_eval"]
    assert not (plan.out / run.BLANK_ANSWERS).exists()
    assert "blank" not in report["scores"]["strict"]["closed accuracy"]
    assert "not run" in (plan.out / run.PAGE).read_text()


def test_everything_is_printed(tmp_path: Path) -> None:
    out = io.StringIO()
    run.print_report(run.evaluate_model(make_plan(tmp_path), good_engine), out=out)
    text = out.getvalue()
    for words in (
        "blank image",
        "from the image",
        "majority of the test answers: closed 'no'",
        "POS, closed accuracy",
    ):
        assert words in text
    assert "25 questions on 5 images (5 open, 20 closed)" in text


def test_second_run_opens_no_engine_and_other_settings_are_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    first = run.evaluate_model(plan, good_engine)

    def refuse() -> FakeEngine:
        raise CheckpointError("no engine is needed")

    assert run.evaluate_model(plan, refuse)["scores"] == first["scores"]
    other = replace(plan, options=replace(plan.options, settings={"weights": "abc"}))
    with pytest.raises(DataError, match="holds answers with other weights"):
        run.evaluate_model(other, good_engine)
    with pytest.raises(DataError, match="has another text"):
        run.evaluate_model(replace(plan, options=replace(plan.options, choices=True)), good_engine)
    run.evaluate_model(replace(other, resume=False), good_engine)
    with pytest.raises(CheckpointError):
        run.evaluate_model(replace(plan, out=tmp_path / "elsewhere"), refuse)


def test_failed_answers_are_counted_and_shown(tmp_path: Path) -> None:
    report = run.evaluate_model(make_plan(tmp_path), lambda: FakeEngine(broken="What 3"))
    assert report["counts"]["failed"] == 1 and report["blank_counts"]["failed"] == 1
    assert "(failed)" in (tmp_path / "out" / run.PAGE).read_text()


def test_comparison_of_two_folders(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    run.evaluate_model(plan, good_engine)
    run.evaluate_model(replace(plan, out=tmp_path / "other"), FakeEngine)
    report = run.evaluate_model(replace(plan, compare=tmp_path / "other"), good_engine)
    out = io.StringIO()
    run.print_comparison(report["comparison"], out=out)
    scores = report["comparison"]["scores"]
    assert scores["closed accuracy"]["difference"]["value"] == 100.0
    assert scores["open recall"]["difference"]["value"] == 0.0
    assert "this run minus other" in out.getvalue() and "+100.00  [+100.00, +100.00]" in out.getvalue()
    page = (plan.out / run.PAGE).read_text()
    assert "<h2>Beside other</h2>" in page and "+100.00 [100.00, 100.00]" in page
    with pytest.raises(ConfigError, match=r"--compare .*none: no answers\.jsonl there"):
        run.evaluate_model(replace(plan, out=tmp_path / "new", compare=tmp_path / "none"), FakeEngine)
    assert not (tmp_path / "new").exists()


def test_rows_without_reference_are_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    first = plan.samples[0]
    question_only = replace(first, conversation=replace(first.conversation, turns=first.conversation.turns[:1]))
    with pytest.raises(DataError, match="expected a question and its answer"):
        run.evaluate_model(replace(plan, samples=[question_only]), FakeEngine)


def test_unknown_answer_types_are_found_before_anything_is_answered(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    bad = replace(plan.samples[3], meta={**plan.samples[3].meta, "answer_type": "CLOZE"})

    def refuse() -> FakeEngine:
        raise CheckpointError("no engine is needed")

    for changes in ({"samples": [*plan.samples[:3], bad]}, {"train_samples": [bad]}):
        with pytest.raises(DataError, match=r"test\.json, row 3, id '3': answer_type 'CLOZE' is unknown"):
            run.evaluate_model(replace(plan, **changes), refuse)
    assert not plan.out.exists()


@pytest.mark.parametrize(
    ("alias", "compat", "left"),
    [
        ([], "published", 10),
        (["--fix", "all"], "none", 0),
        (["--fix", "yes_no_only", "period_limit"], "published,-yes_no_only,-period_limit", 8),
        (["--compat", "cut_prompt", "--fix", "all"], "cut_prompt,none", 0),
    ],
)
def test_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, alias: list[str], compat: str, left: int) -> None:
    plan = make_plan(tmp_path)
    monkeypatch.setattr(run, "engine_of", lambda args: good_engine())
    words = ["--model", "model", "--data", str(tmp_path / "test.json"), "--image-folder", str(tmp_path / "images")]
    found = []
    for given in (alias, ["--compat", compat]):  # the second run scores the answers of the first
        run.main([*words, "--out", str(plan.out), "--num-resamples", "5", *given])
        found.append({**json.loads((plan.out / run.RESULTS).read_text()), "provenance": None})
    assert found[0] == found[1] and len(found[0]["defects"]) == left


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "llava_processor.json").write_text('{"template": "vicuna_v1"}')
    (model / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(run, "engine_of", lambda args: good_engine())
    words = ["--model", str(model), "--data", str(tmp_path / "test.json"), "--image_folder", str(tmp_path / "images")]
    run.main([*words, "--out", str(plan.out), "--limit", "8", "--num_resamples", "20", "--mm-projector", "x"])
    printed = capsys.readouterr().out
    assert "8 questions" in printed and "blank image" in printed
    results = json.loads((plan.out / run.RESULTS).read_text())
    provenance = results["provenance"]
    assert provenance["template"] == "vicuna_v1" and len(provenance["weights"]) == 64
    assert provenance["command"].startswith("llava eval --model")
    assert provenance["limit"] == 8 and provenance["sampling"]["temperature"] == 0.0
    assert {answer["model_id"] for answer in rows_of(plan.out / run.ANSWERS)} == {"model"}


def test_controls_and_a_table_by_a_field(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, controls=("shuffle", "noise"), by="question_type")
    out = io.StringIO()
    report = run.evaluate_model(plan, good_engine)
    run.print_report(report, out=out)
    assert {path.name for path in plan.out.glob("answers*.jsonl")} == {
        *("answers.jsonl", "answers-blank.jsonl", "answers-shuffle.jsonl", "answers-noise.jsonl")
    }
    shuffle, noise = report["controls"]["shuffle"], report["controls"]["noise"]
    assert shuffle["open recall"]["control"]["value"] < shuffle["open recall"]["answered"]["value"] == 100.0
    assert noise["closed accuracy"]["difference"]["value"] == 50.0  # the fake engine says no to a made image
    images = [row["metadata"]["image"] for row in rows_of(plan.out / "answers-shuffle.jsonl")]
    assert set(images) == {"shuffle"}
    assert report["by"]["field"] == "question_type"
    assert {(row["value"], row["answered"]["num_items"]) for row in report["by"]["rows"]} >= {("POS", 10)}
    for words in ("control shuffle", "control noise", "by question_type"):
        assert words in out.getvalue()
    again = run.evaluate_model(plan, lambda: pytest.fail("the engine was opened"))
    assert again["controls"] == report["controls"]


def test_a_field_that_no_row_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--by scanner: no row has this field; the rows have answer_type"):
        run.evaluate_model(make_plan(tmp_path, by="scanner"), lambda: pytest.fail("the engine was opened"))


def test_tasks_are_listed_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--tasks", "list"])
    assert "vqa-rad" in capsys.readouterr().out


def test_tasks_share_one_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines: list[FakeEngine] = []
    monkeypatch.setattr(run, "engine_of", lambda args: engines.append(good_engine()) or engines[-1])
    (tmp_path / "tasks").mkdir()
    for name in ("first", "second"):
        make_plan(tmp_path / name)
        text = f"name: {name}\nrows: {name}/test.json\nimages: {name}/images\nmetrics: [open recall]\n"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    (tmp_path / "model").mkdir()
    words = ["--model", str(tmp_path / "model"), "--tasks", "first,second", "--tasks-dir", str(tmp_path / "tasks")]
    words += [
        "--data-root",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--controls",
        "none",
        "--num-resamples",
        "9",
    ]
    run.main(words)
    assert len(engines) == 1
    for name in ("first", "second"):
        report = json.loads((tmp_path / "out" / name / run.RESULTS).read_text())
        assert report["task"] == name and report["metrics"] == ["open recall"]
        assert len(report["provenance"]["split_sha256"]) == 64 and report["control_image"] is None
    shown = capsys.readouterr().out
    assert "open recall" in shown and "open exact match" not in shown.partition("legacy")[0]
    with pytest.raises(DataError, match=r"task slake: .*slake/test\.json does not exist; name the folder with"):
        run.main([*words[:2], "--tasks", "slake", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["vqa-rad", "slake", "pathvqa"])
def test_every_shipped_task_has_all_controls_and_a_table_by_any_field(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "engine_of", lambda args: good_engine())
    make_plan(tmp_path / name)
    rows = json.loads((tmp_path / name / "test.json").read_text())
    for number, one in enumerate(rows):
        one["scanner"] = f"S{number % 2}"
    for file in ("train.json", "test.json"):
        (tmp_path / name / file).write_text(json.dumps(rows))
    (tmp_path / "model").mkdir()
    words = ["--model", str(tmp_path / "model"), "--tasks", name, "--data-root", str(tmp_path)]
    words += ["--controls", "blank,shuffle,noise", "--by", "scanner", "--num-resamples", "9"]
    run.main([*words, "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / name / run.RESULTS).read_text())
    assert report["control_image"] and report["controls"].keys() == {"shuffle", "noise"}
    assert report["by"]["field"] == "scanner"
    for one in report["by"]["rows"]:
        assert one["value"] in {"S0", "S1"} and one["answered"]["num_items"] > 0
        assert one["answered"]["low"] <= one["answered"]["value"] <= one["answered"]["high"]
    page = (tmp_path / "out" / name / "report.html").read_text()
    assert "<h2>By scanner</h2>" in page and "shuffle" in page and "noise" in page


def test_the_shipped_tasks_are_those_tested() -> None:
    assert set(read_tasks()) == {"vqa-rad", "slake", "pathvqa"}
