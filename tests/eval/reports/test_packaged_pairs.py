"""`python run.py` inside both folders on 500 packaged pairs: with labels, with graphs, with neither."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.eval.reports.rows import read_pairs
from llava.eval.reports.score import patients
from llava.report_labels.findings import FINDINGS
from llava.report_labels.labeler import label_report
from tests.support.iu_reports import iu_findings
from tests.support.processes import run_command

ROOT = Path(__file__).resolve().parents[3]

NUM_PAIRS = 500

LABEL_NAMES = [f"{kind}-F1-{size}{mark}" for mark in ("", "+") for kind in ("Micro", "Macro") for size in (14, 5)]
GRAPH_NAMES = ["F1-RadGraph", "F1-RadGraph-simple", "F1-RadGraph-complete"]
TEXT_NAMES = ["BLEU-1", "BLEU-4", "ROUGE-L"]
RULE_NAMES = [f"{name}[rule]" for name in LABEL_NAMES]

FACTS = {"value", "median", "ci_l", "ci_h", "clustered", "scale", "direction", "source"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def graph(text: str) -> dict[str, Any]:
    """Return a graph of the words of a text, each in relation to the next; not what a model would find."""
    words = [word.strip(".,") for word in text.split()][:12]
    return {
        "text": text,
        "entities": {
            str(place): {
                "tokens": word,
                "label": "OBS-DP" if place % 2 else "ANAT-DP",
                "relations": [["modify", str(place + 1)]] if place + 1 < len(words) else [],
            }
            for place, word in enumerate(words)
        },
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """500 packaged findings with those of another report as prediction, four reports a patient, and their labels."""
    folder = tmp_path_factory.mktemp("packaged")
    texts = list(iu_findings().values())[: NUM_PAIRS + 1]
    pairs = [(texts[row + 1] if row % 10 else "", texts[row]) for row in range(NUM_PAIRS)]
    rows = [
        {"id": f"p{row // 4}_{row}", "prediction": one, "reference": other} for row, (one, other) in enumerate(pairs)
    ]
    sides = [
        {
            "index": row,
            "prediction": label_report(one).labels,
            "reference": label_report(other).labels,
        }
        for row, (one, other) in enumerate(pairs)
    ]
    graphs = [
        {"index": row, "prediction": graph(one), "reference": graph(other)} for row, (one, other) in enumerate(pairs)
    ]
    return {
        "pairs": write(folder / "pairs.jsonl", rows),
        "labels": write(folder / "labels.jsonl", sides),
        "graphs": write(folder / "graphs.jsonl", graphs),
    }


@pytest.mark.parametrize(
    ("folder", "words", "names"),
    [
        ("rr_eval", [], [*TEXT_NAMES, *RULE_NAMES]),
        ("rrg_eval", ["--labels", "labels"], [*LABEL_NAMES, *TEXT_NAMES, *RULE_NAMES]),
        ("rr_eval", ["--radgraph_annotations", "graphs"], [*GRAPH_NAMES, *TEXT_NAMES, *RULE_NAMES]),
        (
            "rrg_eval",
            ["--labels", "labels", "--radgraph_annotations", "graphs", "--report_chexbert_f1"],
            [*LABEL_NAMES, *GRAPH_NAMES, *TEXT_NAMES, *RULE_NAMES],
        ),
    ],
)
def test_files_and_columns(
    files: dict[str, Path], tmp_path: Path, folder: str, words: list[str], names: list[str]
) -> None:
    given = [str(files.get(word, word)) for word in words]
    command = [sys.executable, "run.py", str(files["pairs"]), *given, "--output_dir", str(tmp_path / "out")]
    done = run_command(command, cwd=ROOT / "llava" / "eval" / folder, timeout=900)
    assert done.returncode == 0, done.stderr
    assert f"Total reports: {NUM_PAIRS}" in done.stdout
    assert ("Four-way F1" in done.stdout) == ("--report_chexbert_f1" in words)
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert content["num_reports"] == NUM_PAIRS and list(content["metrics"]) == names
    skipped = {"CheXbert": LABEL_NAMES[0] not in names, "F1-RadGraph": GRAPH_NAMES[0] not in names}
    assert {name for name, facts in content["scorers"].items() if facts["status"] == "skipped"} == {
        name for name, is_skipped in skipped.items() if is_skipped
    }
    num_patients = len(set(patients(read_pairs(files["pairs"]))))
    for facts in content["metrics"].values():
        assert set(facts) == FACTS and facts["clustered"]["num_clusters"] == num_patients == NUM_PAIRS // 4
        assert facts["ci_l"] <= facts["median"] <= facts["ci_h"] and facts["source"]
    if "--labels" in words:  # they are rule labels here, under the names of given ones
        for name in LABEL_NAMES:
            one, other = content["metrics"][name], content["metrics"][f"{name}[rule]"]
            assert {key: one[key] for key in FACTS - {"source"}} == {key: other[key] for key in FACTS - {"source"}}
    _check_tables(tmp_path / "out", names, content)


def _check_tables(out: Path, names: list[str], content: dict[str, Any]) -> None:
    """Check the tables and the values of each report."""
    with (out / "main.csv").open() as stream:
        header, *rows = csv.reader(stream)
    assert header == ["", *names] and [row[0] for row in rows] == ["median", "ci_l", "ci_h"]
    for kind, *cells in rows:
        assert [float(cell) for cell in cells] == [content["metrics"][name][kind] for name in names]
    for mark in "pn":
        with (out / f"breakdown_{mark}.csv").open() as stream:
            header, *rows = csv.reader(stream)
        assert header == ["", "precision", "recall", "f1-score", "support"]
        assert [row[0] for row in rows] == [*sorted(FINDINGS), "micro avg", "macro avg"]
        micro = float(rows[-2][3])
        tag, plus = "" if "Micro-F1-14" in names else "[rule]", "+" if mark == "p" else ""
        assert micro == pytest.approx(content["metrics"][f"Micro-F1-14{plus}{tag}"]["value"], abs=1e-12)
    lines = [json.loads(line) for line in (out / "per_sample.jsonl").read_text().splitlines()]
    run = [name for name, facts in content["scorers"].items() if facts["status"] == "run"]
    assert [line["index"] for line in lines] == list(range(NUM_PAIRS))
    assert all(set(line) == {"index", "id", *run} for line in lines)
    rouge = sum(line["ROUGE-L"] for line in lines) / NUM_PAIRS
    assert rouge == pytest.approx(content["metrics"]["ROUGE-L"]["value"], abs=1e-12)
    assert (out / "report.html").is_file()
