"""Scorers of reports: what each needs, and its figures.

    names --lookup--> SCORERS[name] --needs met?--> figures, one value per report
                                     \\-- no --> skipped, with the reason

Figures of one scorer keep the order in which they are printed. Every scorer is also a metric of answers
(`llava/scoring/metrics.py`), for tasks that name it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from llava.errors import ConfigError, LlavaError, MissingDependency
from llava.eval.reports import overlap, radgraph
from llava.eval.reports.figures import Array, ReportFigure
from llava.eval.reports.given import read_graphs, read_labels
from llava.eval.reports.label_scores import RULE_TAG, LabelPair, label_array, label_figures, report_f1
from llava.eval.reports.rows import ReportPair
from llava.report_labels.labeler import RULES_VERSION, label_report
from llava.scoring.metrics import METRICS, Metric, MetricFacts, ScoredAnswer

DEFAULT_SCORERS = ("CheXbert", "F1-RadGraph", "BLEU-1", "BLEU-4", "ROUGE-L", "rules")

RULE_SOURCE = f"rule labels {RULES_VERSION}"


class Unmet(LlavaError):
    """Error: needs of a scorer are not met; the message is the reason."""


@dataclass(frozen=True)
class ScoreInputs:
    """Reports, and the values that a user passes in for them.

    Attributes:
        pairs: the reports.
        file: their file, for messages.
        labels: files of given labels.
        graphs: file of given graphs.
        radgraph_case: `new` or `legacy`.
        chexbert: folder of the CheXbert weights.
        radgraph_model: folder of a RadGraph model.
        bleu_scale: 100 or 1.
    """

    pairs: Sequence[ReportPair]
    file: str = "reports"
    labels: Sequence[str | Path] = ()
    graphs: str | Path | None = None
    radgraph_case: str = "new"
    chexbert: str | Path | None = None
    radgraph_model: str | Path | None = None
    bleu_scale: float = 100.0

    @cached_property
    def predictions(self) -> list[str]:
        """Predicted texts."""
        return [pair.prediction for pair in self.pairs]

    @cached_property
    def references(self) -> list[str]:
        """Reference texts."""
        return [pair.reference for pair in self.pairs]

    @cached_property
    def bleu_stats(self) -> Array:
        """Statistics that all orders of BLEU share."""
        return overlap.bleu_stats(self.predictions, self.references)

    @cached_property
    def rule_labels(self) -> LabelPair:
        """Rule labels of both sides."""
        predictions = label_array(label_report(text).labels for text in self.predictions)
        return LabelPair(predictions, label_array(label_report(text).labels for text in self.references), RULE_SOURCE)

    @cached_property
    def chexbert_labels(self) -> LabelPair:
        """Given labels, or those of the CheXbert network.

        Raises:
            Unmet: neither was passed.
        """
        if self.labels:
            return read_labels(self.labels, num_reports=len(self.pairs), reports=self.file)
        if self.chexbert is None:
            raise Unmet("needs a file: --labels with the labels, or --chexbert with the weights")
        from llava.eval.reports.chexbert import label_pair

        return label_pair(self.chexbert, self.predictions, self.references)


@dataclass(frozen=True, slots=True)
class ScorerResult:
    """Figures of a scorer, and its value for each report."""

    figures: list[ReportFigure]
    per_report: list[float]


@dataclass(frozen=True, slots=True)
class Scorer(MetricFacts):
    """Scorer of reports, with its declared needs.

    Attributes:
        run: returns its result.
    """

    run: Callable[[ScoreInputs], ScorerResult]


def _first(figures: list[ReportFigure]) -> ScorerResult:
    stats = figures[0].stats
    return ScorerResult(figures, [float(value) for value in figures[0].combine(stats)])


def _rouge(inputs: ScoreInputs, *, name: str) -> ScorerResult:
    return _first(overlap.rouge_figures([name], inputs.predictions, inputs.references))


def _bleu(inputs: ScoreInputs, *, name: str) -> ScorerResult:
    return _first(overlap.bleu_figures([name], inputs.bleu_stats, scale=inputs.bleu_scale))


def _coco_bleu(inputs: ScoreInputs) -> ScorerResult:
    figures = overlap.coco_bleu_figures(inputs.predictions, inputs.references)
    return ScorerResult(figures, _first(figures[-1:]).per_report)


def _text_figure(
    inputs: ScoreInputs, *, compute: Callable[[Sequence[str], Sequence[str]], ReportFigure]
) -> ScorerResult:
    return _first([compute(inputs.predictions, inputs.references)])


def _chexbert(inputs: ScoreInputs) -> ScorerResult:
    pair = inputs.chexbert_labels
    return ScorerResult(label_figures(pair), report_f1(pair))


def _rules(inputs: ScoreInputs) -> ScorerResult:
    pair = inputs.rule_labels
    return ScorerResult(label_figures(pair, tag=RULE_TAG), report_f1(pair))


def _radgraph(inputs: ScoreInputs) -> ScorerResult:
    texts = list(zip(inputs.predictions, inputs.references, strict=True))
    if inputs.graphs is not None:
        given = read_graphs(inputs.graphs, num_reports=len(texts), reports=inputs.file)
        graphs = [
            (
                radgraph.entities_of(one, f"{inputs.graphs}, row {row}: prediction"),
                radgraph.entities_of(other, f"{inputs.graphs}, row {row}: reference"),
            )
            for row, (one, other) in enumerate(given)
        ]
        model = radgraph.model_of([graph for pair in graphs for graph in pair])
        source = f"RadGraph {model}, given ({Path(inputs.graphs).name})"
    elif inputs.radgraph_model is not None:
        from llava.eval.reports.radgraph_model import annotate

        graphs, source = annotate(inputs.radgraph_model, texts)
    else:
        raise Unmet("needs a file: --radgraph-annotations with the graphs, or --radgraph-model with a model")
    if inputs.radgraph_case == "legacy":
        source += ", legacy case"
    return _first(radgraph.radgraph_figures(graphs, texts, source=source, case=inputs.radgraph_case))


def _bertscore(inputs: ScoreInputs) -> ScorerResult:
    raise Unmet("not computed here; pass the values of another tool with --extra-scores")


def _bleu_scorer(order: int) -> Scorer:
    return Scorer(partial(_bleu, name=f"BLEU-{order}"), version="sacrebleu 13a exp", scale="0-100")


SCORERS: dict[str, Scorer] = {
    "CheXbert": Scorer(_chexbert, version="given labels or CheXbert weights", needs="file"),
    "F1-RadGraph": Scorer(_radgraph, version="given graphs or a RadGraph model", needs="file"),
    "BLEU-1": _bleu_scorer(1),
    "BLEU-2": _bleu_scorer(2),
    "BLEU-3": _bleu_scorer(3),
    "BLEU-4": _bleu_scorer(4),
    "ROUGE-L": Scorer(partial(_rouge, name="ROUGE-L"), version="rouge-score, no stemming"),
    "ROUGE-2": Scorer(partial(_rouge, name="ROUGE-2"), version="rouge-score, no stemming"),
    "BLEU[coco]": Scorer(_coco_bleu, version="COCO form, words"),
    "ROUGE-L[coco]": Scorer(partial(_text_figure, compute=overlap.coco_rouge_figure), version="COCO form, words"),
    "CIDEr-D": Scorer(partial(_text_figure, compute=overlap.cider_figure), version="COCO form, words", scale="0-10"),
    "chrF": Scorer(partial(_text_figure, compute=overlap.chrf_figure), version="sacrebleu", scale="0-100"),
    "rules": Scorer(_rules, version=RULE_SOURCE),
    "BERTScore": Scorer(_bertscore, version="none", needs="file"),
}
"""Scorers by name, in the order of the table."""


def answer_values(items: Sequence[ScoredAnswer], *, name: str) -> list[float]:
    """Return the values of a scorer for answers as reports; NaN for closed questions.

    Raises:
        LlavaError: the needs of the scorer are not met.
    """
    places = [place for place, item in enumerate(items) if not item.closed]
    chosen = [items[place] for place in places]
    pairs = [ReportPair(row, item.prediction, item.reference) for row, item in enumerate(chosen)]
    values = [math.nan] * len(items)
    found = SCORERS[name].run(ScoreInputs(pairs)).per_report if pairs else []
    for place, value in zip(places, found, strict=True):
        values[place] = value
    return values


METRICS.update({name: Metric(name, partial(answer_values, name=name), scorer) for name, scorer in SCORERS.items()})


@dataclass(frozen=True)
class Scored:
    """Results of the scorers that ran, and the status of all requested ones."""

    results: dict[str, ScorerResult]
    status: dict[str, dict[str, str | None]]

    @property
    def figures(self) -> list[ReportFigure]:
        """All figures in the printed order."""
        return [figure for result in self.results.values() for figure in result.figures]


def scorer_names(text: str | None) -> list[str]:
    """Return the names of a list such as `ROUGE-L,rules`, in the printed order; None gives the defaults.

    Raises:
        ConfigError: a name is unknown or none is given.
    """
    if text is None:
        return [name for name in SCORERS if name in DEFAULT_SCORERS]
    words = [word.strip(" \"'") for word in text.strip().strip("()").removeprefix("[").removesuffix("]").split(",")]
    if "coco]" in text and text.strip().endswith("coco]"):  # a bracket inside a name, not around a list
        words = [word.strip(" \"'") for word in text.strip().strip("()").split(",")]
    names = {name.lower(): name for name in SCORERS}
    chosen = set()
    for word in filter(None, words):
        if word.lower() not in names:
            raise ConfigError(f"--scorers: unknown scorer {word!r}; known: {', '.join(SCORERS)}")
        chosen.add(names[word.lower()])
    if not chosen:
        raise ConfigError(f"--scorers: no scorer given; known: {', '.join(SCORERS)}")
    return [name for name in SCORERS if name in chosen]


def run_scorers(inputs: ScoreInputs, names: Sequence[str]) -> Scored:
    """Run scorers; one whose needs are not met is skipped with its reason."""
    results: dict[str, ScorerResult] = {}
    status: dict[str, dict[str, str | None]] = {}
    for name in names:
        try:
            results[name] = SCORERS[name].run(inputs)
        except (Unmet, MissingDependency) as error:
            status[name] = {"status": "skipped", "reason": str(error)}
        else:
            status[name] = {"status": "run", "reason": None}
    return Scored(results, status)
