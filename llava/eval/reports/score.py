"""Scores of a report file: figures with intervals, baseline, strata, breakdowns and per-report values.

pairs --run_scorers--> figures --Resampler--> metrics
      --commonest sentence for all--> the same figures of the baseline
      --label of the reference--> normal and abnormal reports apart
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llava.errors import DataError
from llava.eval.reports.figures import NUM_DRAWS, ReportFigure, Resampler
from llava.eval.reports.label_scores import LabelPair, breakdown, four_way_table
from llava.eval.reports.rows import ReportPair
from llava.eval.reports.scorers import SCORERS, Scored, ScoreInputs, run_scorers
from llava.eval.reports.texts import commonest_sentence, text_facts
from llava.report_labels.findings import FINDINGS, NO_FINDING

CLUSTERS = ("patient", "report")


@dataclass(frozen=True)
class ReportScores:
    """All results of one file.

    Attributes:
        num_reports: number of reports.
        metrics: estimates by figure name, in the printed order.
        scorers: status of each scorer.
        labels: labels that breakdowns and strata use; None without any label scorer.
        extras: baseline, strata, text facts, and per-finding tables.
        per_report: one row per report with a value per scorer.
        has_intervals: whether the published intervals were computed.
    """

    num_reports: int
    metrics: dict[str, dict[str, Any]]
    scorers: dict[str, dict[str, Any]]
    labels: LabelPair | None
    extras: dict[str, Any]
    per_report: list[dict[str, Any]]
    has_intervals: bool


def patients(pairs: Sequence[ReportPair], *, by: str = "patient") -> list[Hashable]:
    """Return the cluster of each report: its patient (the id before `_`), or the report itself."""
    if by == "report":
        return list(range(len(pairs)))
    return [pair.id.split("_")[0] if pair.id else pair.index for pair in pairs]


def score_reports(
    inputs: ScoreInputs,
    names: Sequence[str],
    *,
    extra: Sequence[ReportFigure] = (),
    intervals: bool = True,
    cluster: str = "patient",
    four_way: bool = False,
    num_draws: int = NUM_DRAWS,
) -> ReportScores:
    """Return the scores of a file of reports.

    Args:
        inputs: the reports, and what was given for them.
        names: scorers.
        extra: figures of other tools.
        intervals: compute intervals.
        cluster: `patient` or `report`.
        four_way: add the four-way table.
        num_draws: number of resamples.

    Raises:
        DataError: another tool's figure has the name of a computed one.
    """
    scored = run_scorers(inputs, names)
    figures = all_figures(scored, extra)
    clusters = patients(inputs.pairs, by=cluster)
    resampler = Resampler(clusters, num_draws) if intervals else None
    metrics = {figure.name: _estimate(figure, resampler) for figure in figures}
    labels = _labels_of(inputs, scored)
    extras: dict[str, Any] = {
        "baseline": _baseline(inputs, scored),
        "strata": _strata(figures, labels),
        "texts": text_facts(inputs.pairs),
    }
    if labels is not None:
        tables = {mark: breakdown(labels, with_uncertain=mark == "p") for mark in ("p", "n")}
        extras["breakdown"] = {"source": labels.source, **tables}
    if four_way:
        extras["four_way"] = None if labels is None else {"source": labels.source, "table": four_way_table(labels)}
    return ReportScores(
        len(inputs.pairs), metrics, _status(scored), labels, extras, _per_report(inputs, scored, extra), intervals
    )


def all_figures(scored: Scored, extra: Sequence[ReportFigure]) -> list[ReportFigure]:
    """Return the computed figures and those of other tools.

    Raises:
        DataError: another tool's figure has the name of a computed one.
    """
    taken = {"index", "id", *scored.status, *(figure.name for figure in scored.figures)}
    if repeated := [figure.name for figure in extra if figure.name in taken]:
        raise DataError(f"--extra-scores: {', '.join(repeated)} is computed here; expected a name of its own")
    return [*scored.figures, *extra]


def _estimate(figure: ReportFigure, resampler: Resampler | None) -> dict[str, Any]:
    if resampler is not None:
        return resampler.estimate(figure)
    facts = {"scale": figure.scale, "direction": figure.direction, "source": figure.source}
    return {"value": figure.value(), "median": None, "ci_l": None, "ci_h": None, "clustered": None, **facts}


def _status(scored: Scored) -> dict[str, dict[str, Any]]:
    status = {}
    for name, facts in scored.status.items():
        scorer = SCORERS[name]
        declared = {"version": scorer.version, "needs": scorer.needs, "scale": scorer.scale}
        status[name] = {**facts, **declared, "direction": scorer.direction}
    return status


def _labels_of(inputs: ScoreInputs, scored: Scored) -> LabelPair | None:
    """Return the labels for breakdowns and strata: given or CheXbert labels before rule labels."""
    if "CheXbert" in scored.results:
        return inputs.chexbert_labels
    return inputs.rule_labels if "rules" in scored.results else None


def _baseline(inputs: ScoreInputs, scored: Scored) -> dict[str, Any]:
    """Return the figures of the commonest reference sentence as the prediction for every report."""
    sentence = commonest_sentence(inputs.references)
    pairs = [replace(pair, prediction=sentence) for pair in inputs.pairs]
    # Given labels and graphs belong to the predictions of the file; only what reads texts can be computed again.
    fresh = ScoreInputs(
        pairs,
        inputs.file,
        chexbert=None if inputs.labels else inputs.chexbert,
        radgraph_model=None if inputs.graphs else inputs.radgraph_model,
        radgraph_case=inputs.radgraph_case,
        bleu_scale=inputs.bleu_scale,
    )
    values = {figure.name: figure.value() for figure in run_scorers(fresh, list(scored.results)).figures}
    return {"prediction": "commonest reference sentence", "num_words": len(sentence.split()), "metrics": values}


def _strata(figures: Sequence[ReportFigure], labels: LabelPair | None) -> dict[str, Any]:
    """Return the figures of reports without and with findings, by the label of the reference."""
    if labels is None:
        return {}
    is_normal = labels.references[:, FINDINGS.index(NO_FINDING)] == 1
    strata = {"normal": is_normal, "abnormal": ~is_normal}
    return {
        name: {
            "num_reports": int(chosen.sum()),
            "metrics": {figure.name: figure.value(chosen) if chosen.any() else None for figure in figures},
        }
        for name, chosen in strata.items()
    }


def _per_report(inputs: ScoreInputs, scored: Scored, extra: Sequence[ReportFigure]) -> list[dict[str, Any]]:
    columns = {name: result.per_report for name, result in scored.results.items()}
    columns |= {figure.name: [float(value) for value in figure.stats[:, 0]] for figure in extra}
    return [
        {"index": pair.index, "id": pair.id or None, **{name: values[row] for name, values in columns.items()}}
        for row, pair in enumerate(inputs.pairs)
    ]


def finite(value: Any) -> Any:
    """Return a JSON value in which NaN and infinities are null."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
