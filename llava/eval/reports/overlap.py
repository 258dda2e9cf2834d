"""Word overlap of reports and references (ROUGE, BLEU, CIDEr-D, chrF) as per-report statistics.

ROUGE is that of the package rouge-score without stemming, computed by rouge-score-rs. BLEU is that of sacrebleu
(tokenizer 13a, exponential smoothing); all orders come from one pass. The COCO forms use lower-case words between
spaces and no smoothing, as many papers on reports do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llava.eval.reports.figures import Array, ReportFigure, mean_figure
from llava.utils.lookup import require

EXTRA = "rad"
MAX_ORDER = 4
CHAR_ORDER = 6
CHRF_BETA = 2.0
COCO_BETA = 1.2
CIDER_SIGMA = 6.0


def rouge_figures(types: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> list[ReportFigure]:
    """Return the mean F of ROUGE types such as `ROUGE-L` and `ROUGE-2`."""
    keys = {name: name.lower().replace("-", "").replace("rougel", "rougeL") for name in types}
    scorer = require("rouge_score_rs", EXTRA).RougeScorer(list(keys.values()), use_stemmer=False)
    scores = scorer.score_batch(list(references), list(predictions))
    source = "rouge-score, no stemming"
    return [mean_figure(name, [row[key].fmeasure for row in scores], source=source) for name, key in keys.items()]


def bleu_stats(predictions: Sequence[str], references: Sequence[str]) -> Array:
    """Return n-gram lengths, matches and totals of each pair, [n, 10], with sacrebleu's tokens."""
    tokenize = require("sacrebleu.tokenizers.tokenizer_13a", EXTRA).Tokenizer13a()
    sides = ([tokenize(text.rstrip()).split() for text in texts] for texts in (predictions, references))
    return ngram_stats(*sides)


def ngram_stats(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Array:
    """Return for each pair of word lists both lengths, then matches and totals of orders 1 to 4, [n, 10]."""
    # All pairs at once: n-grams are numbered, and those that both sides of a row have are found by sorting.
    numbers: dict[str, int] = {}
    num = len(predictions)
    texts = [*predictions, *references]
    words = np.array([numbers.setdefault(word, len(numbers)) for text in texts for word in text], dtype=np.int64)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    rows = np.repeat(np.arange(len(texts)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))  # words of the text from here on
    stats = np.zeros((num, 2 + 2 * MAX_ORDER))
    stats[:, 0], stats[:, 1] = lengths[:num], lengths[num:]
    starts, grams = np.arange(len(words)), words
    for order in range(1, MAX_ORDER + 1):
        if order > 1:
            kept = left[starts] >= order
            starts = starts[kept]
            pairs = grams[kept] * max(len(numbers), 1) + words[starts + order - 1]
            grams = np.unique(pairs, return_inverse=True)[1].reshape(-1)
        stats[:, 1 + MAX_ORDER + order] = np.maximum(lengths[:num] - order + 1, 0)
        stats[:, 1 + order] = _num_matches(grams, rows[starts], num)
    return stats


def _num_matches(grams: NDArray[np.int64], rows: NDArray[np.int64], num: int) -> Array:
    """Return the number of n-grams common to each pair, by the smaller count.

    The two sides are `num` rows apart.
    """
    counted = []
    for of_side in (rows < num, rows >= num):
        keys = grams[of_side] * max(num, 1) + rows[of_side] % max(num, 1)
        counted.append(np.unique(keys, return_counts=True))
    shared, one, other = np.intersect1d(counted[0][0], counted[1][0], assume_unique=True, return_indices=True)
    matches = np.minimum(counted[0][1][one], counted[1][1][other])
    return np.bincount(shared % max(num, 1), weights=matches, minlength=num)[:num].astype(np.float64)


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def bleu_figures(names: Sequence[str], stats: Array, *, scale: float = 100.0) -> list[ReportFigure]:
    """Return BLEU of several maximum orders (`BLEU-4`) from shared statistics."""
    return [
        ReportFigure(
            name,
            stats,
            partial(combine_bleu, order=int(name[-1]), scale=scale),
            scale=f"0-{scale:g}",
            source="sacrebleu, 13a, exp",
            interval="sacrebleu",
        )
        for name in names
    ]


def combine_bleu(sums: Array, *, order: int, scale: float = 100.0) -> Array:
    """Return exponentially smoothed BLEU of summed statistics [..., 10]; 0 for an order without n-grams."""
    length, reference = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + order], sums[..., 2 + MAX_ORDER : 2 + MAX_ORDER + order]
    halvings = np.cumsum(matches == 0, axis=-1)  # each order without a match halves the substitute once more
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(matches > 0, matches / totals, 1.0 / (np.exp2(halvings) * totals))
        logs = np.where(totals > 0, np.log(precisions), -np.inf).mean(axis=-1)
        brevity = np.where(length < reference, np.exp(1.0 - reference / length), 1.0)
        value = np.where(matches.any(axis=-1), brevity * np.exp(logs), 0.0)
    return scale * np.nan_to_num(value)


def coco_bleu_figures(predictions: Sequence[str], references: Sequence[str]) -> list[ReportFigure]:
    """Return BLEU-1 to BLEU-4 of the COCO caption tools: lower case, words between spaces, no smoothing."""
    stats = ngram_stats(*([text.lower().split() for text in texts] for texts in (predictions, references)))
    return [
        ReportFigure(f"BLEU-{order}[coco]", stats, partial(_combine_coco, order=order), source="COCO form, words")
        for order in range(1, MAX_ORDER + 1)
    ]


def _combine_coco(sums: Array, *, order: int) -> Array:
    tiny, small = 1e-15, 1e-9
    matches, totals = sums[..., 2 : 2 + order], sums[..., 2 + MAX_ORDER : 2 + MAX_ORDER + order]
    value = np.exp(np.log((matches + tiny) / (totals + small)).mean(axis=-1))
    ratio = (sums[..., 0] + tiny) / (sums[..., 1] + small)
    return np.asarray(np.where(ratio < 1.0, value * np.exp(1.0 - 1.0 / ratio), value))


def coco_rouge_figure(predictions: Sequence[str], references: Sequence[str]) -> ReportFigure:
    """Return ROUGE-L of the COCO caption tools: lower-case words between spaces, beta 1.2."""
    values = []
    for prediction, reference in zip(predictions, references, strict=True):
        one, other = prediction.lower().split(), reference.lower().split()
        shared = longest_common(one, other)
        precision, recall = shared / len(one) if one else 0.0, shared / len(other) if other else 0.0
        square = COCO_BETA**2
        values.append((1 + square) * precision * recall / (recall + square * precision) if shared else 0.0)
    return mean_figure("ROUGE-L[coco]", values, source="COCO form, words, beta 1.2")


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, one bit per word of `one`."""
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    row = full = (1 << len(one)) - 1
    for word in other:
        found = row & places.get(word, 0)
        row = ((row + found) | (row - found)) & full
    return len(one) - row.bit_count()


def cider_figure(predictions: Sequence[str], references: Sequence[str]) -> ReportFigure:
    """Return CIDEr-D with document frequencies of the references of the file."""
    predicted = [_all_ngrams(text) for text in predictions]
    expected = [_all_ngrams(text) for text in references]
    frequency: Counter[tuple[str, ...]] = Counter(gram for grams in expected for gram in grams)
    num = math.log(max(len(references), 1))
    weights = {gram: num - math.log(count) for gram, count in frequency.items()}
    values = [_cider(one, other, weights, num) for one, other in zip(predicted, expected, strict=True)]
    return mean_figure("CIDEr-D", values, scale="0-10", source="frequencies of this file's references")


def _all_ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = text.lower().split()
    grams: Counter[tuple[str, ...]] = Counter()
    for order in range(1, MAX_ORDER + 1):
        grams.update(_ngrams(words, order))
    return grams


def _cider(
    one: Counter[tuple[str, ...]], other: Counter[tuple[str, ...]], weights: dict[tuple[str, ...], float], num: float
) -> float:
    norms = np.zeros((2, MAX_ORDER))
    lengths = [0, 0]
    for side, grams in enumerate((one, other)):
        for gram, count in grams.items():
            norms[side, len(gram) - 1] += (count * weights.get(gram, num)) ** 2
            # The published code uses the number of bigrams as the length.
            lengths[side] += count if len(gram) == 2 else 0
    similar = np.zeros(MAX_ORDER)
    for gram, count in one.items():
        if gram in other:
            weight = weights.get(gram, num) ** 2
            similar[len(gram) - 1] += min(count, other[gram]) * other[gram] * weight
    product = np.sqrt(norms[0] * norms[1])
    values = np.divide(similar, product, out=np.zeros(MAX_ORDER), where=product > 0)
    penalty = math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * CIDER_SIGMA**2))
    return float(10.0 * penalty * values.mean())


def chrf_figure(predictions: Sequence[str], references: Sequence[str]) -> ReportFigure:
    """Return chrF (characters up to order 6, beta 2) of the whole file, as sacrebleu computes it."""
    stats = np.zeros((len(predictions), 3 * CHAR_ORDER))
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        one, other = "".join(prediction.split()), "".join(reference.split())
        for order in range(CHAR_ORDER):
            num_one, num_other = max(len(one) - order, 0), max(len(other) - order, 0)
            if num_other == 0:  # as sacrebleu: characters without counterpart in the reference are not counted
                continue
            stats[row, order], stats[row, CHAR_ORDER + order] = num_one, num_other
            stats[row, 2 * CHAR_ORDER + order] = _num_shared_text(one, other, order + 1)
    return ReportFigure("chrF", stats, _combine_chrf, scale="0-100", source="sacrebleu, characters 6, beta 2")


def _num_shared_text(one: str, other: str, order: int) -> int:
    counts = Counter(other[at : at + order] for at in range(len(other) - order + 1))
    found = Counter(one[at : at + order] for at in range(len(one) - order + 1))
    return sum(min(count, counts[gram]) for gram, count in found.items() if gram in counts)


def _combine_chrf(sums: Array) -> Array:
    one, other, shared = (sums[..., part * CHAR_ORDER : (part + 1) * CHAR_ORDER] for part in range(3))
    used = (one > 0) & (other > 0)
    num = np.maximum(used.sum(axis=-1), 1)
    precision = np.divide(shared, one, out=np.zeros_like(shared), where=used).sum(axis=-1) / num
    recall = np.divide(shared, other, out=np.zeros_like(shared), where=used).sum(axis=-1) / num
    below = CHRF_BETA**2 * precision + recall
    value = (1 + CHRF_BETA**2) * precision * recall
    return np.asarray(100.0 * np.divide(value, below, out=np.zeros_like(value), where=below > 0))
