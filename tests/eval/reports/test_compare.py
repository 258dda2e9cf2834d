"""`llava reports compare`: paired differences, p-values, and files that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava.errors import ConfigError, DataError
from llava.eval.reports.compare import compare_figures, flip_p_value, holm
from llava.eval.reports.compare_cli import compare_main
from llava.eval.reports.figures import Resampler, mean_figure

REFERENCES = [f"The heart is enlarged in case {row}. Small effusion." for row in range(12)]


def write(path: Path, predictions: list[str], references: list[str] | None = None) -> Path:
    texts = zip(predictions, references or REFERENCES, strict=True)
    rows = [{"id": f"p{n // 2}_{n}", "prediction": one, "reference": other} for n, (one, other) in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compare(folder: Path, *words: str) -> dict[str, Any]:
    compare_main([*words, "--out", str(folder / "out"), "--num-resamples", "200"])
    content: dict[str, Any] = json.loads((folder / "out" / "compare.json").read_text())
    return content


def test_a_file_against_itself(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", REFERENCES[::-1])
    content = compare(tmp_path, str(file), str(file))
    for cell in content["differences"].values():
        assert [cell[key] for key in ("value", "ci_l", "ci_h", "p_value", "p_holm")] == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_a_better_file(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", REFERENCES)
    bad = write(tmp_path / "bad.jsonl", ["No effusion."] * 12)
    content = compare(tmp_path, str(good), str(bad), "--scorers", "ROUGE-L,rules")
    cell = content["differences"]["ROUGE-L"]
    assert cell["value"] == pytest.approx(cell["first"] - cell["second"])
    assert cell["ci_l"] > 0.0
    assert cell["p_value"] < 0.05 < cell["p_value"] * 9 + 0.05  # six patients: no exchange of all but two is as extreme
    assert content["differences"]["Micro-F1-14[rule]"]["value"] > 0.5


def test_three_files_are_compared_in_pairs(tmp_path: Path) -> None:
    files = [str(write(tmp_path / f"{name}.jsonl", [name] * 12)) for name in "abc"]
    content = compare(tmp_path, *files, "--scorers", "ROUGE-L")
    assert [(pair["first"], pair["second"]) for pair in content["pairs"]] == [(0, 1), (0, 2), (1, 2)]


def test_given_labels_and_scores_of_each_file(tmp_path: Path) -> None:
    files = [str(write(tmp_path / f"{name}.jsonl", [name] * 12)) for name in "ab"]
    for name, value in (("a", 1), ("b", 0)):
        rows = [{"prediction": {"Edema": value}, "reference": {"Edema": 1}}] * 12
        (tmp_path / f"{name}.labels").write_text("".join(json.dumps(row) + "\n" for row in rows))
        extra = {"name": "GREEN", "direction": "higher", "values": [value] * 12}
        (tmp_path / f"{name}.extra").write_text(json.dumps(extra))
    given = ["--labels", str(tmp_path / "a.labels"), str(tmp_path / "b.labels")]
    given += ["--extra-scores", str(tmp_path / "a.extra"), str(tmp_path / "b.extra")]
    content = compare(tmp_path, *files, *given)
    assert content["differences"]["Micro-F1-14"]["value"] == 1.0
    assert content["differences"]["GREEN"]["value"] == 1.0


@pytest.mark.parametrize(
    ("references", "ids", "message"),
    [
        (["other", *REFERENCES[1:]], None, "row 0: the reference differs"),
        (REFERENCES[:-1], None, "row 11: the file has 11 rows, but"),
    ],
)
def test_other_reports_are_refused(tmp_path: Path, references: list[str], ids: None, message: str) -> None:
    one = write(tmp_path / "a.jsonl", REFERENCES)
    other = write(tmp_path / "b.jsonl", references, references)
    with pytest.raises(DataError) as caught:
        compare(tmp_path, str(one), str(other))
    assert message in str(caught.value)


def test_one_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least two"):
        compare(tmp_path, str(write(tmp_path / "a.jsonl", REFERENCES)))


def test_number_of_label_files(tmp_path: Path) -> None:
    file = str(write(tmp_path / "a.jsonl", REFERENCES))
    with pytest.raises(ConfigError, match="--labels: got 1 files for 2"):
        compare(tmp_path, file, file, "--labels", file)


def test_p_value_of_a_difference_between_patients() -> None:
    # Every patient differs by one: only exchanging none or all gives a difference as large, 2 of 2^n.
    one, other = mean_figure("x", np.ones(16)), mean_figure("x", np.zeros(16))
    assert flip_p_value(one, other, Resampler(range(16))) < 0.005
    # Four patients of four reports each: 2 of 16 exchanges. The bound is four standard errors of 2,000 draws.
    patients = [row // 4 for row in range(16)]
    assert flip_p_value(one, other, Resampler(patients)) == pytest.approx(1 / 8, abs=0.03)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_only_shared_figures_are_compared() -> None:
    systems = [[mean_figure("x", [1.0]), mean_figure("y", [1.0])], [mean_figure("x", [0.0])]]
    assert set(compare_figures(systems, ["p"], num_draws=10)[0]["differences"]) == {"x"}
