"""Metrics of answers by name: the one registry for evaluation, tasks and validation.

    questions with references and answers --Metric.values--> one value per question, NaN where it does not apply

A metric declares version, needs, scale and direction in `MetricFacts`. The scorers of reports are in the table too,
once `llava/eval/reports/scorers.py` is imported; plug-ins add theirs. Importing this module does not load torch.

>>> items = [AnsweredText("left lung", "the left lung", closed=False), AnsweredText("yes", "No.", closed=True)]
>>> METRICS["open exact match"].values(items)
[1.0, nan]
>>> METRICS["closed accuracy"].values(items)
[nan, 0.0]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llava.errors import ConfigError, LlavaError
from llava.scoring.choices import is_closed_hit
from llava.scoring.decisions import words_of
from llava.scoring.overlap import token_overlap
from llava.scoring.strict import same_words, strict_pair
from llava.utils.plugins import add_named, failure_text

NAN = math.nan


class ScoredAnswer(Protocol):
    """Question with its reference and the answer to score; `AnsweredText` is one without a file."""

    @property
    def reference(self) -> str:
        """The right answer."""
        ...

    @property
    def prediction(self) -> str:
        """The answer to score."""
        ...

    @property
    def closed(self) -> bool:
        """Whether the answer is one of few."""
        ...

    @property
    def failed(self) -> bool:
        """Whether the generation of the answer failed."""
        ...

    @property
    def choices(self) -> tuple[str, ...]:
        """Texts of the options of a multiple-choice question."""
        ...

    @property
    def answer_label(self) -> str:
        """Letter of the right option."""
        ...


@dataclass(frozen=True, slots=True)
class AnsweredText:
    """Reference and answer as texts, see `ScoredAnswer`."""

    reference: str
    prediction: str
    closed: bool
    choices: tuple[str, ...] = ()
    answer_label: str = ""
    failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricFacts:
    """What a metric declares.

    Attributes:
        version: version of its rules, or the package that has them.
        needs: `nothing`, `file` or `endpoint`.
        scale: scale of its values.
        direction: `higher` or `lower` is better.
    """

    version: str
    needs: Literal["nothing", "file", "endpoint"] = "nothing"
    scale: str = "0-1"
    direction: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True, slots=True)
class Metric:
    """Metric of answers.

    Attributes:
        name: key in `METRICS`.
        values: returns one value per question, NaN where the metric does not apply.
        facts: what it declares.
    """

    name: str
    values: Callable[[Sequence[ScoredAnswer]], list[float]]
    facts: MetricFacts

    @property
    def title(self) -> str:
        """The name in tables of percentages."""
        return self.name if self.facts.direction == "higher" else f"{self.name} (lower is better)"

    def shares(self, items: Sequence[ScoredAnswer]) -> list[float]:
        """Return the values as shares from 0 to 1.

        Raises:
            ConfigError: the metric fails, or gives not one number per question, or one outside the declared scale.
        """
        most = SCALES[self.facts.scale]
        try:
            values = [float(value) for value in self.values(items)]
        except LlavaError:
            raise
        except Exception as error:  # of a plug-in; LLAVA_TRACEBACK shows where
            raise ConfigError(f"metric {self.name!r} failed: {failure_text(error)}") from error
        if len(values) != len(items):
            raise ConfigError(f"metric {self.name!r} returned {len(values)} values for {len(items)} questions")
        for place, value in enumerate(values):
            if not (math.isnan(value) or 0 <= value <= most * (1 + 1e-9)):
                raise ConfigError(
                    f"metric {self.name!r} returned {value} for question {place}; its scale is {self.facts.scale}"
                )
        return [value / most for value in values]


def closed_hit(item: ScoredAnswer) -> float:
    """Return 1 if the option, decision (yes/no) or else the answer equals the reference's, otherwise 0.

    A failed or empty answer is never right.
    """
    if item.failed:
        return 0.0
    return float(is_closed_hit(item.reference, item.prediction, choices=item.choices, label=item.answer_label))


def open_values(item: ScoredAnswer) -> tuple[float, float, float]:
    """Return exact match, F1 and recall of an open answer; NaN for a closed question."""
    if item.closed:
        return NAN, NAN, NAN
    if item.failed:
        return 0.0, 0.0, 0.0
    reference, prediction = strict_pair(item.reference, item.prediction)
    f1, _, recall = token_overlap(Counter(reference), Counter(prediction))
    return float(same_words(reference, prediction)), f1, recall


def _closed(items: Sequence[ScoredAnswer]) -> list[float]:
    return [closed_hit(item) if item.closed else NAN for item in items]


def _open(place: int) -> Callable[[Sequence[ScoredAnswer]], list[float]]:
    return lambda items: [open_values(item)[place] for item in items]


def _word_recall(item: ScoredAnswer) -> float:
    """Return the share of an open reference's words found in the answer; NaN for a closed question."""
    if item.closed:
        return NAN
    wanted, found = words_of(item.reference), set(words_of(item.prediction))
    return sum(word in found for word in wanted) / max(len(wanted), 1)


STRICT = MetricFacts(version="strict 2")

SCALES = {"0-1": 1.0, "0-100": 100.0}
"""Scales that a table of percentages can show, with their upper ends."""

STRICT_NAMES = ("closed accuracy", "open exact match", "open f1", "open recall")
"""Metrics that every evaluation shows, and those of a task that names none."""

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("closed accuracy", _closed, STRICT),
        Metric("open exact match", _open(0), STRICT),
        Metric("open f1", _open(1), STRICT),
        Metric("open recall", _open(2), STRICT),
        # The recall of validation during training; it keeps articles and repeated words.
        Metric("open word recall", lambda items: [_word_recall(item) for item in items], MetricFacts(version="1")),
    )
}
"""Metrics by name, in the order of tables; scorers of reports and plug-ins add to it."""


def add_metric(metric: Metric) -> None:
    """Add a metric to `METRICS`.

    Raises:
        ConfigError: its name exists already or has a comma, or what it declares is not of the allowed values.
    """
    facts = metric.facts
    if facts.direction not in ("higher", "lower") or facts.needs not in ("nothing", "file", "endpoint"):
        raise ConfigError(
            f"metric {metric.name!r}: direction is {facts.direction!r} and needs {facts.needs!r}; expected higher or "
            "lower, and nothing, file or endpoint"
        )
    if "," in metric.name:
        raise ConfigError(f"metric {metric.name!r}: a comma separates the names of --metrics; choose another name")
    add_named(METRICS, metric.name, metric, "metric")


def metrics_named(names: Sequence[str], *, place: str) -> list[Metric]:
    """Return the metrics of names, for a table of percentages.

    Args:
        names: keys of `METRICS`.
        place: where the names are written, for messages.

    Raises:
        ConfigError: a name is unknown, or its metric needs a file or has another scale.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"{place}: unknown metric {name!r}; known: {', '.join(METRICS)}")
        facts = METRICS[name].facts
        if facts.needs != "nothing" or facts.scale not in SCALES:
            raise ConfigError(
                f"{place}: metric {name!r} needs {facts.needs} and has the scale {facts.scale}; expected one that "
                f"needs nothing, with the scale {' or '.join(SCALES)}. `llava reports score` has all scorers of reports"
            )
    return [METRICS[name] for name in names]
