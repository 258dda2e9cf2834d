"""`llava compare`: figures, settings that differ, scores and curves of training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.cli import main as llava
from llava.errors import ConfigError, DataError
from llava.train.compare import main
from llava.utils.jsonl import write_json, write_records


def write_run(
    folder: Path, *, rate: float, losses: list[float], sha: str = "a" * 64, score: float | None = 50.0
) -> Path:
    """Write what `llava train` and `llava eval` leave in the folder of a run."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {
            "step": 10 * step,
            "loss": loss,
            "learning_rate": rate,
            "tokens_per_second": 100.0 * step,
            "peak_memory_gb": step,
        }
        for step, loss in enumerate(losses, start=1)
    ]
    rows += [{"step": 10, "eval_loss": 3.0}, {"step": 20, "eval_loss": 2.5}, {"step": 20, "train_runtime": 61.2}]
    write_records(folder / "metrics.jsonl", rows)
    arguments = {
        "model": {"lora_enable": rate > 1},
        "training": {"learning_rate": rate, "seed": 0, "output_dir": str(folder)},
    }
    write_json(folder / "resolved_arguments.json", arguments)
    write_json(folder / "provenance.json", {"data_sha256": sha, "seed": 0, "layout": "tree", "options": {"x": rate}})
    if score is not None:
        estimate = {"value": score, "low": score - 5, "high": score + 5, "num_items": 9}
        gray = {**estimate, "value": 40.0}
        strict = {"closed accuracy": {"answered": estimate, "blank": gray}, "empty": {"answered": {"num_items": 0}}}
        facts = {"data": {"questions": {"file": "test.json", "sha256": "b" * 64}}, "limit": None}
        (folder / "eval").mkdir()
        write_json(folder / "eval" / "results.json", {"scores": {"strict": strict}, "provenance": facts})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    first = write_run(tmp_path / "first", rate=0.5, losses=[4.0, 3.0])
    second = write_run(tmp_path / "second", rate=2.0, losses=[4.0, 2.0], sha="c" * 64, score=None)
    return [str(first), str(second)]


def compared(runs: list[str], folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return the tables of a comparison."""
    main([*runs, "--json", str(folder / "out.json")])
    tables: dict[str, dict[str, list[str]]] = json.loads((folder / "out.json").read_text())["tables"]
    return tables


def test_figures_of_each_run(runs: list[str], tmp_path: Path) -> None:
    assert compared(runs, tmp_path)["Figures"] == {
        "steps": ["20", "20"],
        "loss, last": ["3", "2"],
        "loss on held-out rows, lowest": ["2.5 (step 20)", "2.5 (step 20)"],
        "tokens per second, median": ["150", "150"],
        "peak memory, GB": ["2.00", "2.00"],
        "time, s": ["61", "61"],
    }


def test_only_settings_that_differ_are_listed(runs: list[str], tmp_path: Path) -> None:
    assert compared(runs, tmp_path)["Settings that differ"] == {
        "--lora-enable": ["no", "yes"],
        "--learning-rate": ["0.5", "2.0"],
        "data sha256": ["a" * 12, "c" * 12],
    }
    assert compared([runs[0]] * 2, tmp_path)["Settings that differ"] == {}


def test_scores_are_matched_by_their_questions(runs: list[str], tmp_path: Path) -> None:
    third = write_run(tmp_path / "third", rate=0.5, losses=[1.0], score=70.0)
    tables = compared([*runs, str(third)], tmp_path)
    assert tables["Scores on test.json (SHA-256 bbbbbbbb)"] == {
        "closed accuracy": ["50.0 [45.0, 55.0], gray 40.0", "-", "70.0 [65.0, 75.0], gray 40.0"]
    }


def test_the_text_and_the_page(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava(["compare", *runs, "--html", str(tmp_path / "page.html")])
    shown = capsys.readouterr().out
    assert "Settings that differ" in shown and "--learning-rate" in shown and f"page: {tmp_path / 'page.html'}" in shown
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="line1"') == page.count('class="line2"') == 5
    assert 'key1"><b>first</b>' in page and 'key2"><b>second</b>' in page


def test_runs_of_one_name_are_told_apart_by_their_paths(runs: list[str], tmp_path: Path) -> None:
    other = write_run(tmp_path / "more" / "first", rate=0.5, losses=[1.0])
    main([runs[0], str(other), "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["runs"] == [runs[0], str(other)]


def test_what_cannot_be_compared(runs: list[str], tmp_path: Path) -> None:
    for given in (runs[:1], runs * 3):
        with pytest.raises(ConfigError, match=f"{len(given)} given; expected two to 4 output folders"):
            main(given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no resolved_arguments.json; expected the output folder"):
        main([runs[0], str(tmp_path / "empty")])


def test_runs_without_logs_are_compared(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "resolved_arguments.json", {"training": {"seed": len(name)}})
        runs.append(str(tmp_path / name))
    main([*runs, "--html", str(tmp_path / "page.html")])
    assert "No run has logged twice." in (tmp_path / "page.html").read_text()
