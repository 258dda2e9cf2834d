"""Medical VQA scores, one value per item: published scores with their defects, and strict scores.

A published figure is the mean of these values over the open or the closed questions. The published scores are for
comparison with tables in the literature, whose "Open" is `recall` and whose "Closed" is the `yes/no accuracy` of
`run_eval_batch`; `strict_scores` has none of these defects.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from llava.compat import parse_compat
from llava.errors import MissingDependency
from llava.eval.intervals import ItemScores
from llava.eval.medvqa.items import ScoredItem
from llava.scoring.decisions import DECISIONS, first_decision
from llava.scoring.metrics import METRICS, STRICT_NAMES, metrics_named
from llava.scoring.normalize import normalize_answer
from llava.scoring.overlap import token_overlap
from llava.scoring.strict import strict_form
from llava.utils.lookup import require

Program = Literal["run_eval", "run_eval_batch"]

METRIC_VERSION = "3"
"""Version of the scores; incremented whenever a figure of the same answers changes."""

PUBLISHED = parse_compat("published", "scores")
"""Defects of run_eval and run_eval_batch; only the PathVQA scripts also drop misses."""

NAN = math.nan


@dataclass(frozen=True, slots=True)
class NormalizedPair:
    """Normalized texts of one item."""

    reference: str
    prediction: str
    closed: bool

    @property
    def reference_words(self) -> Counter[str]:
        return Counter(self.reference.split())

    @property
    def prediction_words(self) -> Counter[str]:
        return Counter(self.prediction.split())


def legacy_scores(
    items: Sequence[ScoredItem],
    *,
    program: Program,
    candidates: Sequence[str] | None = None,
    defects: frozenset[str] = PUBLISHED,
) -> dict[str, list[float]]:
    """Return the value of every item for every score of `program`, in the order of its table.

    Args:
        items: questions with answers.
        program: program whose formulas are used; the two differ in open and closed accuracy.
        candidates: open answers of the training set for run_eval's open accuracy; None leaves that score out.
        defects: names in `llava.compat` to reproduce.

    Returns:
        n values per score; NaN where the score does not apply to the item. BLEU is left out without nltk.
    """
    parse_compat(",".join(defects), "scores")
    all_periods = "period_limit" not in defects
    pairs = [
        NormalizedPair(
            normalize_answer(item.reference, all_periods=all_periods),
            normalize_answer(item.prediction, all_periods=all_periods),
            item.closed,
        )
        for item in items
    ]
    columns: dict[str, list[float]] = {"exact match score": _over(pairs, lambda pair: _exact(pair, defects))}
    overlaps = [token_overlap(pair.reference_words, pair.prediction_words, defects=defects) for pair in pairs]
    for position, name in enumerate(("f1 score", "precision", "recall")):
        columns[name] = [NAN if pair.closed else o[position] for pair, o in zip(pairs, overlaps, strict=True)]
    columns |= _bleu_scores(pairs, defects)
    if program == "run_eval_batch":
        columns["open accuracy"] = _over(pairs, lambda pair: _open_hit(pair, defects))
    elif candidates is not None:
        table = Candidates(candidates)
        columns["open accuracy"] = _over(pairs, lambda pair: table.hit(pair, defects))
    columns["yes/no accuracy"] = _over(pairs, lambda pair: _closed_hit(pair, program, defects), closed=True)
    if program == "run_eval_batch":
        recalls = [overlap[2] for overlap in overlaps]
        columns["recall_closed"] = [r if pair.closed else NAN for pair, r in zip(pairs, recalls, strict=True)]
    return columns


def _over(
    pairs: Sequence[NormalizedPair], score: Callable[[NormalizedPair], float], *, closed: bool = False
) -> list[float]:
    return [score(pair) if pair.closed is closed else NAN for pair in pairs]


def _exact(pair: NormalizedPair, defects: frozenset[str]) -> float:
    if "precision_as_exact_match" not in defects:
        return float(pair.reference == pair.prediction)
    words = pair.prediction_words
    shared = sum(1 for word in pair.reference_words if word in words)
    return shared / words.total() if words else 0.0


def _bleu_scores(pairs: Sequence[NormalizedPair], defects: frozenset[str]) -> dict[str, list[float]]:
    """Return the four BLEU columns; an empty table if nltk is not installed."""
    try:
        bleu = require("nltk.translate.bleu_score", "eval")
    except MissingDependency:
        return {}
    single = "single_order_bleu" in defects
    weights = {
        "bleu_score": (0.25, 0.25, 0.25, 0.25),
        "bleu_score_1": (1.0, 0.0, 0.0, 0.0),
        "bleu_score_2": (0.0, 1.0, 0.0, 0.0) if single else (0.5, 0.5),
        "bleu_score_3": (0.0, 0.0, 1.0, 0.0) if single else (1 / 3, 1 / 3, 1 / 3),
    }
    smoothing = None if "unsmoothed_bleu" in defects else bleu.SmoothingFunction().method1
    columns: dict[str, list[float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns about every short answer
        for name, weight in weights.items():
            columns[name] = [
                NAN
                if pair.closed
                else float(
                    bleu.sentence_bleu(
                        [pair.reference.split()], pair.prediction.split(), weights=weight, smoothing_function=smoothing
                    )
                )
                for pair in pairs
            ]
    return columns


def _open_hit(pair: NormalizedPair, defects: frozenset[str]) -> float:
    if "substring_open" in defects:
        return float(pair.reference in pair.prediction)
    return float(pair.reference == pair.prediction)


def _closed_hit(pair: NormalizedPair, program: Program, defects: frozenset[str]) -> float:
    if "substring_closed" in defects:
        hit = pair.reference in pair.prediction
        decided = "yes" in pair.prediction or "no" in pair.prediction
    else:
        words = pair.prediction.split()
        hit = f" {pair.reference} " in f" {pair.prediction} "
        decided = "yes" in words or "no" in words
    if program == "run_eval" and "yes_no_only" in defects:
        hit = hit and decided
    return NAN if not hit and "dropped_closed_misses" in defects else float(hit)


class Candidates:
    """Open answers of the training set; an answer selects the candidate whose words it covers best."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.normalized = [normalize_answer(text) for text in texts]
        self.words = [frozenset(text.split()) for text in self.normalized]

    def hit(self, pair: NormalizedPair, defects: frozenset[str]) -> float:
        """Return 1 if the candidate that the answer covers best, the first of equals, is the reference."""
        said = pair.prediction_words.keys()
        shares = [len(words & said) / len(words) if words else 0.0 for words in self.words]
        best = max(range(len(shares)), key=shares.__getitem__, default=None)
        if best is None or (shares[best] == 0.0 and "first_candidate" not in defects):
            return 0.0
        return float(self.normalized[best] == pair.reference)


def is_unparsable(item: ScoredItem) -> bool:
    """Return whether the answer to a yes/no question has no decision."""
    return item.closed and strict_form(item.reference) in DECISIONS and first_decision(item.prediction) is None


def strict_scores(items: Sequence[ScoredItem], metrics: Sequence[str] = ()) -> dict[str, ItemScores]:
    """Return all strict scores of the items; with question types, also the means over types.

    Args:
        items: the answered questions.
        metrics: names of further metrics in `METRICS`, by their titles in the result.
    """
    values = {name: METRICS[name].values(items) for name in STRICT_NAMES}
    scores = {name: ItemScores.of(found) for name, found in values.items()}
    for metric in metrics_named([name for name in metrics if name not in STRICT_NAMES], place="metrics"):
        scores[metric.title] = ItemScores.of(metric.shares(items))
    types = [item.types for item in items]
    if any(types):
        scores["closed accuracy, mean over types"] = ItemScores.of(values["closed accuracy"], types)
        scores["open recall, mean over types"] = ItemScores.of(values["open recall"], types)
    return scores
