"""Figures on real pairs equal those of rouge-score, scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn.metrics import f1_score

from llava.eval.reports.figures import Resampler
from llava.eval.reports.label_scores import LabelPair, is_positive, label_array, label_figures
from llava.eval.reports.overlap import rouge_figures
from llava.report_labels.findings import FINDINGS, FIVE_FINDINGS
from llava.report_labels.labeler import label_report
from tests.eval.reports.test_overlap import real_pairs

NUM_PAIRS = 120


@pytest.fixture(scope="module")
def labels() -> LabelPair:
    """Rule labels of changed and of real reports."""
    sides = [label_array(label_report(text).labels for text in texts) for texts in real_pairs(NUM_PAIRS)]
    return LabelPair(sides[0], sides[1], "rules")


@pytest.mark.parametrize(("name", "key"), [("ROUGE-L", "rougeL"), ("ROUGE-2", "rouge2")])
def test_rouge(name: str, key: str) -> None:
    oracle = RougeScorer([key], use_stemmer=False)
    predictions, references = real_pairs(NUM_PAIRS)
    expected = [oracle.score(one, other)[key].fmeasure for one, other in zip(references, predictions, strict=True)]
    [figure] = rouge_figures([name], predictions, references)
    assert 0 < figure.value() < 1
    assert figure.stats[:, 0] == pytest.approx(expected, abs=1e-12)


def test_label_figures(labels: LabelPair) -> None:
    five = [FINDINGS.index(name) for name in FIVE_FINDINGS]
    values = {figure.name: figure.value() for figure in label_figures(labels)}
    for mark in ("", "+"):
        found, asked = (
            is_positive(side, with_uncertain=mark == "+") for side in (labels.predictions, labels.references)
        )
        for average in ("micro", "macro"):
            for columns in (list(range(14)), five):
                name = f"{average.capitalize()}-F1-{len(columns)}{mark}"
                expected = f1_score(asked[:, columns], found[:, columns], average=average, zero_division=0)
                assert 0 < values[name] < 1 and values[name] == pytest.approx(expected, abs=1e-12), name


def test_interval_of_a_label_figure(labels: LabelPair) -> None:
    figure = label_figures(labels)[0]

    def statistic(indices: np.ndarray) -> float:
        return float(figure.combine(figure.stats[indices].sum(axis=0)))

    drawn = stats.bootstrap(
        (np.arange(NUM_PAIRS),),
        statistic,
        n_resamples=500,
        method="percentile",
        vectorized=False,
        random_state=np.random.RandomState(3),
    )
    facts = Resampler(range(NUM_PAIRS)).estimate(figure)
    expected = [drawn.confidence_interval.low, drawn.confidence_interval.high]
    assert [facts["ci_l"], facts["ci_h"]] == pytest.approx(expected, abs=1e-12)
    assert facts["median"] == pytest.approx(np.median(drawn.bootstrap_distribution), abs=1e-12)
