"""The table against figures computed by hand, and what counts where."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError, DataError
from llava.eval.judge.scores import Rated, read_rated
from llava.eval.judge.summary import groups_of, interval_table, published_table, review_text, score_summary
from tests.support.judges import question, write_lines


def rated(number: int, kind: str, domains: tuple[str, ...], scores: tuple[float, float] | None) -> Rated:
    failure = "" if scores else "no scores"
    return Rated(str(number), kind, domains, f"{number // 2}.jpg", scores, failure, num_words=(4, 2))


ROWS = [
    rated(0, "conversation", ("chest_xray",), (8.0, 4.0)),
    rated(1, "conversation", ("mri", "ct_scan"), (10.0, 9.0)),
    rated(2, "detailed_description", ("chest_xray",), (5.0, 6.0)),
    rated(3, "conversation", ("histology", "gross"), (4.0, 1.0)),
    rated(4, "detailed_description", ("mri",), None),
]


def test_figures_by_hand() -> None:
    groups = score_summary(ROWS, num_resamples=50)["groups"]
    assert list(groups) == [
        "conversation",
        "detailed_description",
        "chest_xray",
        "mri",
        "histology",
        "overall",
    ]
    # overall: references 8 10 5 4, answers 4 9 6 1; ratios 0.5 0.9 1.2 0.25
    overall = groups["overall"]
    assert (overall["data_size"], overall["asked"]) == (4, 5)
    assert overall["gpt4_score"]["value"] == pytest.approx(27 / 4)
    assert overall["pred_score"]["value"] == pytest.approx(20 / 4)
    assert overall["pred_relative_score"]["value"] == pytest.approx(71.25)
    assert overall["ratio_of_means"]["value"] == pytest.approx(100 * 20 / 27)
    assert overall["pred_relative_score"]["low"] <= 71.25 <= overall["pred_relative_score"]["high"]
    # conversation: 8 10 4 and 4 9 1; ratios 0.5 0.9 0.25
    conversation = groups["conversation"]
    assert conversation["pred_relative_score"]["value"] == pytest.approx(55.0)
    assert conversation["ratio_of_means"]["value"] == pytest.approx(100 * 14 / 22)
    assert groups["chest_xray"]["pred_relative_score"]["value"] == pytest.approx(85.0)
    assert groups["mri"]["data_size"] == 1 and groups["mri"]["asked"] == 2


def test_a_figure_of_several_domains() -> None:
    groups = groups_of(ROWS, domains="all")
    assert groups["ct_scan"].sum() == 1 and groups["gross"].sum() == 1 and groups["mri"].sum() == 2
    assert "ct_scan" not in groups_of(ROWS)
    other = groups_of([rated(0, "quiz", ("endoscopy",), (1.0, 1.0)), ROWS[1], rated(2, "", (), (1.0, 1.0))])
    assert list(other) == ["conversation", "quiz", "mri", "endoscopy", "overall"]


def test_intervals_resample_images_not_questions() -> None:
    """Two images with four equal questions each give the interval of two questions."""
    many = [rated(0, "conversation", ("mri",), (10.0, 2.0))] * 4 + [rated(2, "conversation", ("mri",), (10.0, 8.0))] * 4
    estimate = score_summary(many, num_resamples=200)["groups"]["overall"]["pred_relative_score"]
    assert estimate == {"value": pytest.approx(50.0), "low": pytest.approx(20.0), "high": pytest.approx(80.0)}


def test_nothing_scored_and_no_resamples() -> None:
    report = score_summary([ROWS[4]], num_resamples=0)
    assert report["groups"]["mri"]["pred_score"] == {"value": None, "low": None, "high": None}
    assert report["failures"] == {"no scores": 1}
    assert "-" in published_table(report) and "[-, -]" in interval_table(report)
    assert score_summary(ROWS, num_resamples=0)["groups"]["overall"]["pred_score"] == {
        "value": 5.0,
        "low": None,
        "high": None,
    }
    json.dumps(report, allow_nan=False)


def test_tables_as_published() -> None:
    lines = published_table(score_summary(ROWS, num_resamples=5)).splitlines()
    assert lines[0].split() == ["conversation", "detailed_description", "chest_xray", "mri", "histology", "overall"]
    assert [line.split()[0] for line in lines[2:]] == ["gpt4_score", "pred_score", "pred_relative_score", "data_size"]
    assert lines[4].split()[1:] == ["55", "120", "85", "90", "25", "71.25"]
    assert lines[5].split()[1:] == ["3", "1", "2", "1", "1", "4"]
    assert "71.25 [" in interval_table(score_summary(ROWS, num_resamples=5)).splitlines()[-1]


def test_review_of_llava_by_hand() -> None:
    rows = [rated(0, "conv", (), (8.0, 6.0)), rated(1, "conv", (), (6.0, 6.0)), rated(2, "detail", (), (5.0, 4.0))]
    assert review_text("x", [*rows, rated(3, "conv", (), None)]).splitlines() == [
        "GPT-4 vs. x",
        "all 6.333 5.333 84.2",
        "conv 7.000 6.000 85.7",
        "detail 5.000 4.000 80.0",
        "=" * 33,
    ]
    counted = review_text("x", [*rows, rated(3, "conv", (), None)], minus_one_counts=True).splitlines()
    assert counted[1] == "all 4.500 3.750 83.3"


def test_every_layout_of_rows_is_read(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "s.jsonl",
        [
            {**question(0), "ans1": "a b c", "ans2": "d", "result": "8 7\nwhy"},
            {**question(1), "gpt_eval": "8, 7\nwhy"},
            {**question(2), "result": None},
            {"question_id": 9, "category": "conv", "tuple": [-1, -1]},
            {"question_id": 10, "category": "conv", "tuple": [9, 8]},
            {**question(3), "result": "ignored", "judgement": {"scores": [7.5, 6], "orders": {"12": {"scores": None}}}},
            {**question(4), "judgement": {"scores": None, "failure": "the answer failed", "orders": {}}},
        ],
    )
    rows = read_rated(path)
    assert [one.scores for one in rows] == [(8.0, 7.0), (8.0, 7.0), None, None, (9.0, 8.0), (7.5, 6.0), None]
    assert [one.failure for one in rows] == ["", "", "no reply", "no scores", "", "", "the answer failed"]
    assert rows[0].num_words == (3, 1) and rows[1].num_words is None
    assert rows[3].review and rows[3].type == "conv" and not rows[0].review
    assert rows[5].orders == {"12": None}
    assert [one.scores for one in read_rated(path, parser="literal")][:2] == [(8.0, 7.0), None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 0}, "holds no scores"),
        ({"tuple": [1]}, "two numbers"),
        ({"tuple": [1, True]}, "two numbers"),
        ({"result": 5}, "must be text"),
        ({"judgement": {"scores": [math.inf, 1]}}, "two numbers"),
    ],
)
def test_rows_without_scores_are_refused(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"row 0: .*{message}"):
        read_rated(write_lines(tmp_path / "s.jsonl", [row]))


def test_empty_files_and_repeated_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        read_rated(write_lines(tmp_path / "s.jsonl", []))
    with pytest.raises(DataError, match="unique"):
        read_rated(write_lines(tmp_path / "s.jsonl", [{"question_id": 1, "tuple": [1, 1]}] * 2))
    with pytest.raises(ConfigError, match="unknown parser"):
        read_rated(tmp_path / "s.jsonl", parser="x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 11) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["scores", "orders", "mri"]), inner),
    max_leaves=6,
)
FIELDS = ("judgement", "tuple", "result", "gpt_eval", "domain", "image", "type", "question_id", "ans1", "ans2")


@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), json_values), max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_rows_are_read_or_refused(rows: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = read_rated(write_lines(Path(folder) / "s.jsonl", rows))
        except DataError:
            return
    json.dumps(score_summary(found, num_resamples=3))
