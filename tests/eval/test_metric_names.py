"""Metrics by name: answers, reports and plug-ins in one table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava.errors import ConfigError
from llava.eval.medvqa.items import ScoredItem
from llava.eval.medvqa.metrics import strict_scores
from llava.eval.metric_names import chosen_metrics
from llava.scoring.metrics import Metric, MetricFacts

pytestmark = pytest.mark.usefixtures("no_plugins")


def test_scorers_of_reports_are_metrics_of_an_evaluation() -> None:
    answers = [("the heart is enlarged", "the heart is large", False), ("yes", "no", True)]
    items: Any = [
        ScoredItem(str(number), "q", reference, prediction, closed, image=str(number))
        for number, (reference, prediction, closed) in enumerate(answers)
    ]
    names = chosen_metrics("ROUGE-L,BLEU-1,chrF,rules,open word recall,closed accuracy")
    scores = strict_scores(items, names)
    assert scores["ROUGE-L"].mean() == pytest.approx(75.0) and scores["BLEU-1"].mean() == pytest.approx(75.0)
    assert all(scores[name].num_items == 1 for name in names)
    with pytest.raises(ConfigError, match="--metrics: metric 'CheXbert' needs file"):
        chosen_metrics("CheXbert")
    with pytest.raises(ConfigError, match="the scale 0-10"):
        chosen_metrics("CIDEr-D")
    with pytest.raises(ConfigError, match="--metrics: unknown metric 'BLEU'"):
        chosen_metrics("BLEU")


def test_a_metric_of_which_less_is_better(tmp_path: Path) -> None:
    facts = MetricFacts(version="1", direction="lower", scale="0-100")
    assert Metric("length", lambda items: [50.0], facts).title == "length (lower is better)"
    assert Metric("length", lambda items: [50.0], facts).shares([SimpleNamespace()]) == [0.5]  # type: ignore[list-item]
