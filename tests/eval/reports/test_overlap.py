"""ROUGE, BLEU, CIDEr-D and chrF: golden values, and equality with sacrebleu."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from llava.eval.reports.figures import ReportFigure, Resampler
from llava.eval.reports.overlap import (
    bleu_figures,
    bleu_stats,
    chrf_figure,
    cider_figure,
    coco_bleu_figures,
    coco_rouge_figure,
    longest_common,
    rouge_figures,
)
from tests.support.iu_reports import iu_findings

PREDICTIONS = [
    "Heart size is mildly enlarged. There is no pneumothorax.",
    "Bibasilar atelectasis and low lung volumes.",
    "The lungs are clear.",
]
REFERENCES = [
    "The heart is mildly enlarged. No pleural effusion or pneumothorax.",
    "Low lung volumes with bibasilar atelectasis.",
    "Lungs are clear.",
]


def bleu(order: int, predictions: list[str], references: list[str]) -> ReportFigure:
    return bleu_figures([f"BLEU-{order}"], bleu_stats(predictions, references))[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ROUGE-L", [0.631579, 0.5, 0.857143]), ("ROUGE-2", [0.235294, 0.6, 0.8])],
)
def test_rouge_of_each_report(name: str, expected: list[float]) -> None:
    (figure,) = rouge_figures([name], PREDICTIONS, REFERENCES)
    assert figure.stats[:, 0] == pytest.approx(expected, abs=1e-6)


def test_rouge_interval() -> None:
    (figure,) = rouge_figures(["ROUGE-L"], PREDICTIONS, REFERENCES)
    facts = Resampler(range(3)).estimate(figure)
    found = [facts[key] for key in ("value", "median", "ci_l", "ci_h")]
    assert found == pytest.approx([0.662907, 0.662907, 0.5, 0.857143], abs=1e-6)


@pytest.mark.parametrize(
    ("order", "value", "mean", "half"),
    [(1, 56.521739, 55.687514, 5.097253), (4, 22.346369, 21.573757, 10.597857)],
)
def test_bleu(order: int, value: float, mean: float, half: float) -> None:
    facts = Resampler(range(3)).estimate(bleu(order, PREDICTIONS, REFERENCES))
    assert facts["value"] == facts["median"] == pytest.approx(value, abs=1e-6)
    assert [facts["ci_l"], facts["ci_h"]] == pytest.approx([mean - half, mean + half], abs=1e-5)


def test_precisions_and_brevity_of_bleu() -> None:
    stats = bleu_stats(PREDICTIONS, REFERENCES).sum(axis=0)
    assert 100 * stats[2:6] / stats[6:10] == pytest.approx([56.5217, 35.0, 17.6471, 7.1429], abs=1e-4)
    assert stats[0] >= stats[1]  # no brevity penalty


def real_pairs(number: int) -> tuple[list[str], list[str]]:
    """Return real references with changed predictions: of others, shouted, shuffled, shortened, empty and odd."""
    texts = list(iu_findings().values())[: number + 1]
    generator = random.Random(0)
    predictions = []
    for place, text in enumerate(texts[:-1]):
        sentences = text.split(". ")
        generator.shuffle(sentences)
        changes = [
            texts[place + 1],
            text.upper(),
            ". ".join(sentences),
            ". ".join(sentences[1:]),
            "",
            "&amp; 1.2,3-4 ½",
        ]
        predictions.append(changes[place % len(changes)])
    return predictions, texts[:-1]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_equals_sacrebleu(order: int) -> None:
    predictions, references = real_pairs(150)
    expected = sacrebleu.BLEU(max_ngram_order=order).corpus_score(predictions, [references], n_bootstrap=500)
    facts = Resampler(range(150)).estimate(bleu(order, predictions, references))
    assert facts["value"] == pytest.approx(expected.score, abs=1e-9)
    low, high = expected._mean - expected._ci, expected._mean + expected._ci
    assert [facts["ci_l"], facts["ci_h"]] == pytest.approx([low, high], abs=1e-5)  # sacrebleu sums in float32


def test_chrf_equals_sacrebleu() -> None:
    predictions, references = real_pairs(60)
    expected = sacrebleu.CHRF().corpus_score(predictions, [references]).score
    assert chrf_figure(predictions, references).value() == pytest.approx(expected, abs=1e-9)


def test_scale_of_bleu() -> None:
    stats = bleu_stats(PREDICTIONS, REFERENCES)
    (figure,) = bleu_figures(["BLEU-1"], stats, scale=1.0)
    assert (figure.value(), figure.scale) == (pytest.approx(0.56521739), "0-1")


REPORTS = st.lists(st.text(alphabet="ab c.,", max_size=20), min_size=1, max_size=6)


@given(REPORTS)
def test_identical_reports_score_one(texts: list[str]) -> None:
    (rouge,) = rouge_figures(["ROUGE-L"], texts, texts)
    has_words = [any(char.isalnum() for char in text) for text in texts]
    assert list(rouge.stats[:, 0]) == [float(found) for found in has_words]


@pytest.mark.parametrize(("text", "expected"), [("a b c d", 100.0), ("a b c", 0.0)])
def test_bleu_of_identical_reports(text: str, expected: float) -> None:
    assert bleu(4, [text], [text]).value() == pytest.approx(expected)


@given(REPORTS, st.randoms())
def test_order_of_rows_changes_no_value(texts: list[str], generator: random.Random) -> None:
    pairs = list(zip(texts, reversed(texts), strict=True))
    moved = generator.sample(pairs, len(pairs))
    values = []
    for rows in (pairs, moved):
        predictions, references = [row[0] for row in rows], [row[1] for row in rows]
        figures = [bleu(4, predictions, references), chrf_figure(predictions, references)]
        figures += [coco_rouge_figure(predictions, references), *coco_bleu_figures(predictions, references)]
        values.append([figure.value() for figure in figures])
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_coco_bleu_has_no_smoothing() -> None:
    values = [figure.value() for figure in coco_bleu_figures(["the heart is large"], ["The heart is normal now"])]
    brevity = np.exp(1 - 5 / 4)
    expected = [brevity * 3 / 4, brevity * (3 / 4 * 2 / 3) ** 0.5, brevity * (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3), 0.0]
    assert values == pytest.approx(expected, abs=1e-4)


def test_coco_rouge() -> None:
    precision, recall, square = 3 / 4, 3 / 5, 1.2**2
    expected = (1 + square) * precision * recall / (recall + square * precision)
    assert coco_rouge_figure(["the heart is large"], ["The heart is normal now"]).value() == pytest.approx(expected)


def test_cider_of_identical_reports_is_ten() -> None:
    texts = ["the heart is large today", "no effusion is seen here"]
    assert cider_figure(texts, texts).value() == pytest.approx(10.0)


def test_cider_of_other_words_is_zero() -> None:
    assert cider_figure(["x y z", "no effusion"], ["the heart", "no effusion"]).stats[0, 0] == 0.0


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, left in enumerate(one, 1):
        for j, right in enumerate(other, 1):
            table[i, j] = table[i - 1, j - 1] + 1 if left == right else max(table[i - 1, j], table[i, j - 1])
    assert longest_common(one, other) == table[-1, -1]
