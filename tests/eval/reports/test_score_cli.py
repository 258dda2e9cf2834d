"""`run.py` and `llava reports score`: files, figures, given values, and bad inputs."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llava.errors import ConfigError, LlavaError
from llava.eval.reports.cli import score_main
from llava.eval.reports.scorers import SCORERS, scorer_names
from llava.report_labels.findings import FINDINGS

ROOT = Path(__file__).resolve().parents[3]

ROWS = [
    {"id": "p1_s1", "prediction": "Small left effusion.", "reference": "Small right effusion. No edema."},
    {"id": "p1_s2", "prediction": "The heart is enlarged.", "reference": "The heart is enlarged, unchanged."},
    {"id": "p2_s3", "prediction": "", "reference": "The lungs are clear."},
    {"id": "p3_s4", "prediction": "The lungs are clear.", "reference": "The lungs are clear."},
]
GRAPH = {"entities": {"1": {"tokens": "effusion", "label": "OBS-DP", "relations": []}}}


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """A file of four reports."""
    return write(tmp_path / "reports.jsonl", ROWS)


def score(reports: Path, *words: str) -> dict[str, Any]:
    """Score a file and return metrics.json."""
    out = reports.parent / "out"
    score_main([str(reports), "--output_dir", str(out), *words])
    content: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return content


def labels_file(path: Path, number: int = 4, value: Any = 1) -> Path:
    side = {name: None for name in FINDINGS} | {"Edema": value}
    return write(path, [{"index": row, "prediction": side, "reference": side} for row in range(number)])


def test_files_and_columns(reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = score(reports)
    out = reports.parent / "out"
    names = {"main.csv", "breakdown_p.csv", "breakdown_n.csv", "per_sample.jsonl", "metrics.json", "report.html"}
    assert {path.name for path in out.iterdir()} == names
    table = list(csv.reader(io.StringIO((out / "main.csv").read_text())))
    assert [row[0] for row in table] == ["", "median", "ci_l", "ci_h"]
    assert table[0][1:4] == ["BLEU-1", "BLEU-4", "ROUGE-L"]
    assert table[0][4] == "Micro-F1-14[rule]"
    lines = (out / "breakdown_p.csv").read_text().splitlines()
    assert lines[0] == ",precision,recall,f1-score,support"
    assert [line.split(",")[0] for line in lines[1:]] == [*sorted(FINDINGS), "micro avg", "macro avg"]
    assert content["num_reports"] == 4
    assert content["scorers"]["CheXbert"]["status"] == "skipped"
    assert "--labels" in content["scorers"]["CheXbert"]["reason"]
    assert content["scorers"]["rules"]["status"] == "run"
    assert content["metrics"]["ROUGE-L"]["clustered"]["num_clusters"] == 3
    assert "Micro-F1-14" not in content["metrics"]
    assert "Total reports: 4" in capsys.readouterr().out


def test_values_of_each_report(reports: Path) -> None:
    score(reports)
    rows = [json.loads(line) for line in (reports.parent / "out" / "per_sample.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["ROUGE-L"] for row in rows][2:] == [0.0, 1.0]
    assert set(rows[0]) == {"index", "id", "BLEU-1", "BLEU-4", "ROUGE-L", "rules"}


def test_what_is_always_shown(reports: Path) -> None:
    content = score(reports)
    assert content["texts"]["swapped_sides"] == 1
    assert content["texts"]["empty_predictions"] == 1
    assert content["texts"]["prior_words"] == {"prediction": 0.0, "reference": 0.25}
    assert content["baseline"]["num_words"] == 4
    assert content["baseline"]["metrics"]["ROUGE-L"] > 0.5
    assert content["strata"]["normal"]["num_reports"] == 2
    assert content["strata"]["abnormal"]["num_reports"] == 2


def test_given_labels(reports: Path, tmp_path: Path) -> None:
    content = score(reports, "--labels", str(labels_file(tmp_path / "labels.jsonl")))
    assert list(content["metrics"])[:4] == ["Micro-F1-14", "Micro-F1-5", "Macro-F1-14", "Macro-F1-5"]
    assert content["metrics"]["Micro-F1-14"]["value"] == 1.0
    assert content["metrics"]["Micro-F1-14"]["source"] == "given (labels.jsonl)"
    assert content["breakdown"]["source"] == "given (labels.jsonl)"
    assert content["breakdown"]["n"]["Edema"]["support"] == 4.0


def test_the_file_may_follow_the_labels(reports: Path, tmp_path: Path) -> None:
    labels = labels_file(tmp_path / "labels.jsonl")
    score_main(["--labels", str(labels), str(reports), "--output-dir", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert content["num_reports"] == 4 and content["metrics"]["Micro-F1-14"]["source"] == "given (labels.jsonl)"


@pytest.mark.parametrize("words", [[], ["--labels", "labels.jsonl"], ["--scorers", "rules"]])
def test_no_file_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        score_main(words)
    assert stopped.value.code == 2 and "expected FILE" in capsys.readouterr().err


def test_chexpert_tables(reports: Path, tmp_path: Path) -> None:
    for name, values in (("one", "1.0,\n-1.0,\n,\n0.0,\n"), ("other", "1.0,\n1.0,\n,\n0.0,\n")):
        (tmp_path / f"{name}.csv").write_text(f"Edema,Airspace Opacity\n{values}")
    content = score(reports, "--labels", f"{tmp_path / 'one.csv'}", f"{tmp_path / 'other.csv'}")
    assert content["metrics"]["Micro-F1-14"]["value"] == pytest.approx(2 / 3)
    assert content["metrics"]["Micro-F1-14+"]["value"] == 1.0


def test_findings_that_no_row_names_are_warned_of(
    reports: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prediction": dict.fromkeys(FINDINGS, 1), "reference": {"Edema": 1}}] * 4
    score(reports, "--labels", str(write(tmp_path / "labels.jsonl", rows)))
    [line] = [record.getMessage() for record in caplog.records if "no row names" in record.getMessage()]
    assert "labels.jsonl: reference: no row names Enlarged Cardiomediastinum, " in line and "Edema" not in line


def test_table_of_both_sides(reports: Path, tmp_path: Path) -> None:
    (tmp_path / "both.csv").write_text("index,prediction_Edema,reference_Edema\n0,1,1\n1,0,1\n2,,\n3,,\n")
    content = score(reports, "--labels", str(tmp_path / "both.csv"))
    assert content["metrics"]["Micro-F1-14"]["value"] == pytest.approx(2 / 3)


def test_given_graphs(reports: Path, tmp_path: Path) -> None:
    rows = [{"index": row, "prediction": GRAPH, "reference": GRAPH} for row in range(4)]
    content = score(reports, "--radgraph_annotations", str(write(tmp_path / "graphs.jsonl", rows)))
    assert content["metrics"]["F1-RadGraph"]["value"] == 0.75  # one prediction is empty
    assert content["metrics"]["F1-RadGraph"]["source"].startswith("RadGraph v1")
    assert list(content["metrics"])[:3] == ["F1-RadGraph", "F1-RadGraph-simple", "F1-RadGraph-complete"]


def test_extra_scores(reports: Path, tmp_path: Path) -> None:
    given = [{"name": "GREEN", "direction": "higher", "values": [0.1, 0.2, 0.3, 0.4]}]
    (tmp_path / "extra.json").write_text(json.dumps(given))
    content = score(reports, "--extra_scores", str(tmp_path / "extra.json"))
    assert content["metrics"]["GREEN"]["value"] == pytest.approx(0.25)
    assert content["metrics"]["GREEN"]["clustered"]["num_clusters"] == 3


def test_without_intervals(reports: Path) -> None:
    content = score(reports, "--bootstrap_ci", "False", "--scorers", "ROUGE-L")
    assert content["metrics"]["ROUGE-L"]["ci_l"] is None
    assert (reports.parent / "out" / "main.csv").read_text().splitlines()[0] == ",value"


def test_four_way_table_is_printed(reports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = score(reports, "--report_chexbert_f1", "--labels", str(labels_file(tmp_path / "labels.jsonl")))
    assert content["four_way"]["table"]["Edema"]["positive"] == 1.0
    assert "Four-way F1" in capsys.readouterr().out


def test_four_way_table_without_labels(reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(reports, "--report_chexbert_f1", "--scorers", "ROUGE-L")["four_way"] is None
    assert "Four-way F1: no labels" in capsys.readouterr().out


class FakeTracker(ModuleType):
    """Module with the calls of wandb that the command makes."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: list[Any] = []

    def init(self, **settings: Any) -> FakeTracker:
        self.logged.append(settings["name"])
        return self

    def log(self, values: Mapping[str, Any]) -> None:
        self.logged.append(dict(values))

    def finish(self) -> None:
        self.logged.append("end")


def test_figures_are_logged_under_the_published_keys(reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    figures = score(reports, "--wandb", "--scorers", "ROUGE-L", "--run_name", "mine")["metrics"]["ROUGE-L"]
    expected = {f"ROUGE-L-{row}": figures[row] for row in ("median", "ci_l", "ci_h")}
    assert tracker.logged == ["mine", expected, "end"]


def test_a_missing_tracker_is_named_before_anything_is_scored(reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LlavaError, match="wandb is required"):
        score(reports, "--wandb")
    assert not (reports.parent / "out").exists()


def test_every_scorer_is_known_by_its_status(reports: Path) -> None:
    content = score(reports, "--scorers", ",".join(SCORERS))
    assert set(content["scorers"]) == set(SCORERS)
    assert content["scorers"]["BERTScore"]["status"] == "skipped"
    assert {"BLEU-2", "BLEU-3", "ROUGE-2", "BLEU-4[coco]", "ROUGE-L[coco]", "CIDEr-D", "chrF"} <= set(
        content["metrics"]
    )
    assert all({"version", "needs", "scale", "direction"} <= set(facts) for facts in content["scorers"].values())


def test_candidate_and_csv(tmp_path: Path) -> None:
    (tmp_path / "reports.csv").write_text(
        'candidate,reference\n"The lungs are clear.","The lungs are clear."\n,"No edema."\n'
    )
    content = score(tmp_path / "reports.csv", "--scorers", "ROUGE-L")
    assert content["metrics"]["ROUGE-L"]["value"] == 0.5


def test_semicolons_of_excel(tmp_path: Path) -> None:
    (tmp_path / "reports.csv").write_text('prediction;reference\n"Clear, no edema.";"Clear, no edema."\n')
    assert score(tmp_path / "reports.csv", "--scorers", "ROUGE-L")["metrics"]["ROUGE-L"]["value"] == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rouge-l,rules", ["ROUGE-L", "rules"]),
        ('["BLEU-4","ROUGE-L"]', ["BLEU-4", "ROUGE-L"]),
        ("BLEU[coco]", ["BLEU[coco]"]),
        ("ROUGE-L, BLEU-1", ["BLEU-1", "ROUGE-L"]),
        (None, ["CheXbert", "F1-RadGraph", "BLEU-1", "BLEU-4", "ROUGE-L", "rules"]),
    ],
)
def test_names_of_scorers(text: str | None, expected: list[str]) -> None:
    assert scorer_names(text) == expected


@pytest.mark.parametrize("text", ["ROUGE", ",", ""])
def test_unknown_scorers(text: str) -> None:
    with pytest.raises(ConfigError, match="--scorers"):
        scorer_names(text)


BAD_FILES = [
    ('{"prediction": "a"}\n', "row 0: no field 'reference'"),
    ('{"reference": "a"}\n', "row 0: no field 'prediction' or 'candidate'"),
    (
        '{"prediction": "a", "reference": "b"}\n{"prediction": null, "reference": "b"}\n',
        "row 1: field 'prediction' is null",
    ),
    ('{"prediction": NaN, "reference": "b"}\n', "row 0: field 'prediction' is NaN"),
    ('{"prediction": "nan", "reference": "b"}\n', "row 0: field 'prediction' is the text 'nan'"),
    ('{"prediction": "a", "reference": 3}\n', "row 0: field 'reference' is int"),
    ('[{"prediction": "a", "reference": ["b"]}]', "row 0: field 'reference' is list"),
    ("", "no rows"),
    ("[]", "no rows"),
    ("[1]", "row 0: expected an object"),
    ('{"prediction": "a", "reference": "b"}\n{oops\n', "row 1"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_bad_reports(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(LlavaError) as caught:
        score_main([str(tmp_path / "bad.jsonl"), "--output_dir", str(tmp_path / "out")])
    assert message in str(caught.value)
    assert "bad.jsonl" in str(caught.value)
    assert not (tmp_path / "out").exists()


SIDE = {"Edema": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prediction": SIDE, "reference": SIDE}] * 3, "row 3: is missing; the file has 3 rows, but"),
        ([{"prediction": SIDE, "reference": SIDE}] * 5, "row 4: has no report; the file has 5 rows, but"),
        ([{"prediction": {"Edema": 2}, "reference": SIDE}] * 4, "row 0: prediction, Edema is 2; expected 1, 0, -1"),
        ([{"prediction": {"Odema": 1}, "reference": SIDE}] * 4, "row 0: prediction: unknown finding 'Odema'"),
        ([{"prediction": {"Edema": True}, "reference": SIDE}] * 4, "row 0: prediction, Edema is bool"),
        ([{"prediction": SIDE}] * 4, "row 0: expected objects 'prediction' and 'reference'"),
        ([{"index": 1, "prediction": SIDE, "reference": SIDE}] * 4, "row 0: 'index' is 1; expected 0"),
        ([{"Edema": 1}] * 4, "row 0: a table of one side"),
    ],
)
def test_bad_labels(reports: Path, tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(LlavaError) as caught:
        score(reports, "--labels", str(write(tmp_path / "labels.jsonl", rows)))
    assert message in str(caught.value)
    assert "labels.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prediction": GRAPH, "reference": GRAPH}] * 2, "row 2: is missing; the file has 2 rows"),
        ([{"prediction": GRAPH}] * 4, "row 0: expected graphs 'prediction' and 'reference'"),
        ([{"prediction": "text", "reference": GRAPH}] * 4, "row 0: prediction: expected a graph"),
    ],
)
def test_bad_graphs(reports: Path, tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(LlavaError) as caught:
        score(reports, "--radgraph-annotations", str(write(tmp_path / "graphs.jsonl", rows)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"direction": "higher", "values": [1, 2, 3, 4]}, "'name' is missing"),
        ({"name": "G", "direction": "up", "values": [1, 2, 3, 4]}, "'direction' of 'G' must be higher or lower"),
        ({"name": "G", "direction": "lower", "values": [1, 2, 3]}, "row 3: is missing"),
        ({"name": "G", "direction": "lower", "values": [1, 2, None, 4]}, "row 2: the value of 'G'"),
        ({"name": "G", "direction": "lower", "values": 3}, "must be a list"),
        ({"name": "ROUGE-L", "direction": "higher", "values": [1, 2, 3, 4]}, "ROUGE-L is computed here"),
    ],
)
def test_bad_extra_scores(reports: Path, tmp_path: Path, given: Any, message: str) -> None:
    (tmp_path / "extra.json").write_text(json.dumps(given))
    with pytest.raises(LlavaError) as caught:
        score(reports, "--extra-scores", str(tmp_path / "extra.json"))
    assert message in str(caught.value)


@pytest.mark.parametrize("folder", ["rr_eval", "rrg_eval"])
def test_published_command(reports: Path, folder: str) -> None:
    command = [sys.executable, "run.py", str(reports), "--output_dir", str(reports.parent / "out"), "--run_name", "x"]
    done = subprocess.run(command, cwd=ROOT / "llava" / "eval" / folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Total reports: 4" in done.stdout
    assert json.loads((reports.parent / "out" / "metrics.json").read_text())["provenance"]["run_name"] == "x"


def test_published_command_rejects_bad_input(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prediction": "words of a patient", "reference": null}\n')
    command = [sys.executable, "run.py", str(tmp_path / "bad.jsonl"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT / "llava" / "eval" / "rr_eval", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bad.jsonl, row 0" in done.stderr
    assert "patient" not in done.stderr and "Traceback" not in done.stderr


def test_neither_torch_nor_transformers_is_loaded(reports: Path) -> None:
    code = (
        "import sys; from llava.eval.reports.cli import score_main; "
        f"score_main([{str(reports)!r}, '--output-dir', {str(reports.parent / 'out')!r}]); "
        "sys.exit(1 if {'torch', 'transformers', 'sklearn', 'scipy'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
