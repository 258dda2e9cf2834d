"""The notebook of published results: its cells run, and print the means of the tables in a results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.eval.medvqa.report import legacy_table

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOK = ROOT / "llava" / "notebook" / "run_eval_metrics.ipynb"


def cells() -> list[str]:
    """Return the code of the notebook, cell by cell."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def table(recall: float, closed: float) -> str:
    return legacy_table({"exact match score": [0.5], "recall": [recall, 0.0], "yes/no accuracy": [closed]})


def test_the_cells_print_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"dataset": "vqa_rad", "pred_file": "runs/med_a/vqa_rad/x-test-answer-file.jsonl", "results": table(0.8, 0.75)},
        {
            "dataset": "Slake1.0",
            "pred_file": "runs/med_a/Slake1.0/x-test-answer-file.jsonl",
            "results": table(0.6, 0.5),
        },
        {"dataset": "vqa_rad", "pred_file": "runs/b/x-test-answer-file.jsonl", "results": table(0.2, 0.25)},
    ]
    path = tmp_path / "eval_results_med_datasets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("RESULTS", str(path))
    names: dict[str, Any] = {}
    for number, code in enumerate(cells()):
        exec(compile(code, f"cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "3 scored answer files in eval_results_med_datasets.jsonl" in printed and "2 runs" in printed
    [line] = [text for text in printed.splitlines() if text.startswith("med_a ")]
    assert line.split() == ["med_a", "40.00", "/", "75.00", "30.00", "/", "50.00", "nan", "/", "nan", "48.75"]
    assert "b & 10.00 & 25.00 & - & - & - & - & 17.50 \\\\" in printed and "med\\_a & 40.00" in printed
