"""run_eval and run_eval_batch: the published figures, and failures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.compat import parse_compat
from llava.errors import ConfigError, DataError
from llava.eval import run_eval, run_eval_batch
from tests.support.eval_fakes import row, rows_of, write_vqa


@pytest.fixture
def oracle(shared: Path) -> Path:
    folder = shared / "oracles" / "llava-med-eval"
    if not folder.is_dir():
        pytest.skip("the scoring oracle is not available")
    return folder


def figures(table: str) -> dict[str, float]:
    """Read a printed table back."""
    below = table.partition("-------------\n")[2].partition("\n\n")[0]
    lines = [line for line in below.splitlines() if not line.startswith("note: ")]
    return {name.strip(): float(value) for name, value in (line.rsplit(None, 1) for line in lines)}


def expected(oracle: Path, key: str) -> dict[str, float]:
    return json.loads((oracle / "expected_metrics.json").read_text())[key]


def test_run_eval_gives_the_published_figures(oracle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("nltk", reason="BLEU needs nltk")
    out = tmp_path / "figures.json"
    files = {"--gt": "test.json", "--candidate": "candidate.json", "--pred": "answer-file-llava-zeroshot.jsonl"}
    words = [word for option, name in files.items() for word in (option, str(oracle / name))]
    run_eval.main([*words, "--num-resamples", "20", "--out", str(out), "--some-old-flag", "x"])
    printed = capsys.readouterr().out
    assert figures(printed) == pytest.approx(expected(oracle, "run_eval"), rel=1e-5)
    assert "num_open 233 || num_close 151" in printed
    report = json.loads(out.read_text())
    assert report["scores"]["strict"]["closed accuracy"]["answered"]["num_items"] == 233
    assert report["provenance"]["data"]["answers"]["sha256"]
    assert report["counts"] == {
        "questions": 384,
        "open": 151,
        "closed": 233,
        "images": 192,
        "failed": 0,
        "unparsable": 119,
    }


@pytest.mark.parametrize("layout", ["root", "dataset", "beside"])
def test_run_eval_batch_gives_the_published_figures(
    oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    pytest.importorskip("nltk", reason="BLEU needs nltk")
    folder = tmp_path / "runs" / "vqa_rad"
    folder.mkdir(parents=True)
    shutil.copy(oracle / "answer-file-llava-zeroshot.jsonl", folder / "x-test-answer-file.jsonl")
    words = ["--pred_file_parent_path", str(tmp_path / "runs"), "--target_test_type", "test-answer-file"]
    if layout == "root":
        words += ["--gt-root", str(oracle)]
    elif layout == "dataset":
        (tmp_path / "gt" / "vqa_rad").mkdir(parents=True)
        shutil.copy(oracle / "test.json", tmp_path / "gt" / "vqa_rad")
        words += ["--gt-root", str(tmp_path / "gt")]
    else:
        shutil.copy(oracle / "test.json", folder)
    monkeypatch.chdir(tmp_path)
    run_eval_batch.main([*words, "--num-resamples", "5"])
    (result,) = rows_of(tmp_path / "eval_results_med_datasets.jsonl")
    assert result["dataset"] == "vqa_rad"
    assert figures(result["results"]) == pytest.approx(expected(oracle, "batch"), rel=1e-5)


def small_run(tmp_path: Path) -> tuple[Path, Path]:
    rows = [row(1, "a.png", "Q1?", "yes"), row(2, "b.png", "Q2?", "lung", kind="OPEN")]
    truth, _ = write_vqa(tmp_path, rows)
    pred = tmp_path / "pred.jsonl"
    lines = [{"question_id": "2", "text": "the lung"}, {"question_id": 1, "text": "Normal."}]
    pred.write_text("\n".join(map(json.dumps, lines)))
    return truth, pred


def test_small_files_repair_and_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, pred = small_run(tmp_path)
    run_eval.main(["--gt", str(truth), "--pred", str(pred), "--num-resamples", "5"])
    first = capsys.readouterr().out
    assert figures(first)["exact match score"] == 100.0
    assert "the row 'open accuracy' is left out" in first
    run_eval.main(
        ["--gt", str(truth), "--pred", str(pred), "--num-resamples", "5", "--fix", "all", "--dataset", "pvqa"]
    )
    second = capsys.readouterr().out
    assert "num_open 1 || num_close 1" in second
    assert list(figures(second)) == ["exact match score", "f1 score", "precision", "recall", "yes/no accuracy"]


ALIASES = [
    ([], "published"),
    (["--fix", "all"], "none"),
    (["--fix", "yes_no_only", "period_limit"], "published,-yes_no_only,-period_limit"),
    (["--with-defect", "dropped_closed_misses"], "published,dropped_closed_misses"),
    (["--with-defect", "all", "--fix", "swapped_counts"], "all,-swapped_counts"),
    (["--with-defect", "none", "--fix", "none"], "published"),
]
"""Published options, and the list of `--compat` that gives the same figures."""


@pytest.mark.parametrize(("alias", "compat"), ALIASES)
def test_aliases_of_run_eval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, alias: list[str], compat: str
) -> None:
    truth, pred = small_run(tmp_path)
    found = []
    for words in (alias, ["--compat", compat]):
        out = ["--num-resamples", "5", "--out", str(tmp_path / "out.json")]
        run_eval.main(["--gt", str(truth), "--pred", str(pred), *out, *words])
        report = json.loads((tmp_path / "out.json").read_text())
        found.append((capsys.readouterr().out, {**report, "provenance": None}))
    assert found[0] == found[1]
    assert found[0][1]["defects"] == sorted(parse_compat(compat, "scores"))


@pytest.mark.parametrize(("alias", "compat"), ALIASES)
def test_aliases_of_run_eval_batch(tmp_path: Path, *, alias: list[str], compat: str) -> None:
    truth, pred = small_run(tmp_path)
    pred.rename(tmp_path / "vqa_rad-test-answer-file.jsonl")
    found = []
    for words in (alias, ["--compat", compat]):
        out = ["--num-resamples", "5", "--results-file", str(tmp_path / "out.jsonl"), "--gt-root", str(truth.parent)]
        run_eval_batch.main(["--pred-file-parent-path", str(tmp_path), *out, *words])
        found.append([{**result, "provenance": None} for result in rows_of(tmp_path / "out.jsonl")])
    assert found[0] == found[1]
    assert found[0][0]["report"]["defects"] == sorted(parse_compat(compat, "scores"))


@pytest.mark.parametrize("option", ["--compat", "--fix", "--with-defect"])
def test_unknown_names_are_refused(tmp_path: Path, option: str) -> None:
    truth, pred = small_run(tmp_path)
    with pytest.raises(ConfigError, match="unknown name nonsense; known: precision_as_exact_match"):
        run_eval.main(["--gt", str(truth), "--pred", str(pred), option, "nonsense"])
    with pytest.raises(ConfigError, match="cut_prompt has no effect in the commands that compute published scores"):
        run_eval.main(["--gt", str(truth), "--pred", str(pred), option, "cut_prompt"])


def test_shortest_prefix_of_the_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, pred = small_run(tmp_path)
    (tmp_path / "candidates.json").write_text('{"0": ["lung"]}')
    words = ["--gt", str(truth), "--pred", str(pred), "--num-resamples", "5"]
    run_eval.main([*words, "--c", str(tmp_path / "candidates.json")])
    assert figures(capsys.readouterr().out)["open accuracy"] == 100.0


def test_wrong_ids_end_the_command(tmp_path: Path) -> None:
    truth, pred = small_run(tmp_path)
    pred.write_text('{"question_id": 3, "text": ""}\n')
    with pytest.raises(DataError, match=r"2 ids \(1, 2\) without an answer, 1 ids \(3\)"):
        run_eval.main(["--gt", str(truth), "--pred", str(pred)])


def test_nothing_scored_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vqa_rad").mkdir()
    (tmp_path / "vqa_rad" / "x-test-answer-file.jsonl").write_text('{"question_id": 1, "text": "a"}\n')
    (tmp_path / "elsewhere-test-answer-file.jsonl").write_text("")
    words = ["--pred_file_parent_path", str(tmp_path)]
    with pytest.raises(SystemExit, match="nothing was scored"):
        run_eval_batch.main(words)
    assert capsys.readouterr().out.count(">>>Skip") == 2
    with pytest.raises(ConfigError, match="test-answer-file"):
        run_eval_batch.main([*words, "--target_test_type", "test"])


def test_scoring_loads_no_torch() -> None:
    code = "import sys, llava.eval.run_eval, llava.eval.run_eval_batch as b; print({'torch', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
