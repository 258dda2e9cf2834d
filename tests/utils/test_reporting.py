"""Alignment of text tables."""

from __future__ import annotations

from llava.utils.reporting import simple_table


def test_numbers_stand_point_under_point() -> None:
    rows = [["exact match score", 0.995452], ["bleu_score", 6.093724e-155], ["yes/no accuracy", 29.18454935]]
    assert simple_table(["Metric", "Performance"], rows).splitlines() == [
        "Metric               Performance",
        "-----------------  -------------",
        "exact match score   0.995452",
        "bleu_score          6.09372e-155",
        "yes/no accuracy    29.1845",
    ]


def test_texts_stand_left() -> None:
    assert simple_table(["a", "b"], [["x", "1"], ["long text", "2"]]).splitlines() == [
        "a          b",
        "---------  ---",
        "x          1",
        "long text  2",
    ]
    assert simple_table(["a"], []).splitlines() == ["a", "---"]
