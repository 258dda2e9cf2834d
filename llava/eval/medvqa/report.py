"""Report of one answer file: all figures as JSON values, and text tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from llava.eval.intervals import Draws, ItemScores, interval_text, percent_text
from llava.eval.medvqa.controls import Majority, by_type, check_same_questions, compare_sets, majority_items
from llava.eval.medvqa.items import ScoredItem
from llava.eval.medvqa.metrics import METRIC_VERSION, PUBLISHED, Program, is_unparsable, legacy_scores, strict_scores
from llava.utils.bootstrap import LEVEL
from llava.utils.reporting import Cell, text_table

HEADERS = ("Metric", "Performance")

NOT_SCORED = {
    "bleu_score": "nltk is not installed; the BLEU rows are left out (pip install 'llava[eval]')",
    "open accuracy": "--candidate is not given; the row 'open accuracy' is left out",
}
"""Notes printed for scores that are missing in the published table."""


def score_sets(
    items: Sequence[ScoredItem],
    *,
    candidates: Sequence[str] | None = None,
    defects: frozenset[str] = PUBLISHED,
    metrics: Sequence[str] = (),
) -> dict[str, dict[str, ItemScores]]:
    """Return all score sets of the items: `strict` with further `metrics`, then published scores."""
    sets = {"strict": strict_scores(items, metrics)}
    for program in get_args(Program):
        columns = legacy_scores(items, program=program, candidates=candidates, defects=defects)
        sets[f"legacy {program}"] = {name: ItemScores.of(values) for name, values in columns.items()}
    return sets


def full_report(
    items: Sequence[ScoredItem],
    *,
    blank: Sequence[ScoredItem] | None = None,
    baseline: Majority | None = None,
    candidates: Sequence[str] | None = None,
    defects: frozenset[str] = PUBLISHED,
    metrics: Sequence[str] = (),
    num_resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all figures of answers as JSON values: percentages with intervals clustered by image.

    Args:
        items: the answered questions.
        blank: the same questions answered on a gray image.
        baseline: the most frequent answers, scored like a model.
        candidates: open answers of the training set, for run_eval's open accuracy.
        defects: known defects of the published scores to reproduce.
        metrics: names of further metrics beside the strict scores.
        num_resamples: number of resamples of the intervals.
        seed: seed of the resampling.
    """
    if blank is not None:
        check_same_questions(items, blank, what="the blank-image control")
    draws = Draws([item.cluster for item in items], num_resamples=num_resamples, seed=seed)
    options: dict[str, Any] = {"candidates": candidates, "defects": defects, "metrics": metrics}
    blank_sets = None if blank is None else score_sets(blank, **options)
    baseline_sets = None if baseline is None else score_sets(majority_items(items, baseline), **options)
    return {
        "metric_version": METRIC_VERSION,
        "defects": sorted(defects),
        "counts": counts(items),
        "blank_counts": None if blank is None else counts(blank),
        "majority": None if baseline is None else asdict(baseline),
        "scores": {
            name: compare_sets(
                scores,
                draws,
                blank=None if blank_sets is None else blank_sets[name],
                baseline=None if baseline_sets is None else baseline_sets[name],
            )
            for name, scores in score_sets(items, **options).items()
        },
        "by_type": by_type(items, blank, num_resamples=num_resamples, seed=seed),
        "intervals": {"level": LEVEL, "clusters": "image", "num_resamples": num_resamples, "seed": seed},
    }


def counts(items: Sequence[ScoredItem]) -> dict[str, int]:
    """Return the numbers of questions, images, failures and answers without a decision."""
    return {
        "questions": len(items),
        "open": sum(not item.closed for item in items),
        "closed": sum(item.closed for item in items),
        "images": len({item.cluster for item in items}),
        "failed": sum(item.failed for item in items),
        "unparsable": sum(is_unparsable(item) for item in items),
    }


def legacy_table(columns: Mapping[str, Sequence[float]], *, names: Sequence[str] | None = None) -> str:
    """Return the two-column table that the published scripts print, values in percent."""
    shown = columns if names is None else [name for name in names if name in columns]
    return text_table(HEADERS, [[name, ItemScores.of(columns[name]).mean()] for name in shown])


def report_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one set of scores as a text table: figure, interval, control, gain from the image, majority."""
    with_blank = any("blank" in row for row in scores.values())
    with_majority = any("majority" in row for row in scores.values())
    headers = ["Metric", "n", "%", "95% interval"]
    headers += ["blank image", "from the image"] if with_blank else []
    headers += ["majority", "above majority"] if with_majority else []
    return text_table(headers, [_report_row(name, row, with_blank, with_majority) for name, row in scores.items()])


def type_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the scores by question type as a text table."""
    with_blank = any("blank" in row for row in rows)
    headers = ["Type, score", "n", "%", "95% interval"] + (["blank image", "from the image"] if with_blank else [])
    cells = [_report_row(f"{row['type']}, {row['score']}", row, with_blank, False) for row in rows]
    return text_table(headers, cells)


def _report_row(name: str, row: Mapping[str, Any], with_blank: bool, with_majority: bool) -> list[Cell]:
    answered = row["answered"]
    cells: list[Cell] = [name, answered["num_items"], percent_text(answered["value"]), interval_text(answered)]
    if with_blank:
        gain = row["from_picture"]
        cells += [
            percent_text(row["blank"]["value"]),
            f"{percent_text(gain['value'], signed=True)} {interval_text(gain)}",
        ]
    if with_majority:
        above = row["above_majority"]
        cells += [percent_text(row["majority"]), f"{percent_text(above['value'], signed=True)} {interval_text(above)}"]
    return cells
