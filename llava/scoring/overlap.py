"""Word overlap of an answer and its reference."""

from __future__ import annotations

from collections.abc import Mapping


def token_overlap(
    reference: Mapping[str, int], prediction: Mapping[str, int], *, defects: frozenset[str] = frozenset()
) -> tuple[float, float, float]:
    """Return F1, precision and recall of the answer's words; zeros without a shared word.

    Args:
        reference: words of the reference with their counts.
        prediction: words of the answer with their counts.
        defects: with `prediction_counts`, a shared word counts as often as it occurs in the answer; otherwise the
            smaller of its two counts is used.
    """
    if "prediction_counts" in defects:
        hits = sum(count for word, count in prediction.items() if word in reference)
        false = sum(count for word, count in prediction.items() if word not in reference)
        missed = sum(count for word, count in reference.items() if word not in prediction)
    else:
        hits = sum(min(count, reference.get(word, 0)) for word, count in prediction.items())
        false, missed = sum(prediction.values()) - hits, sum(reference.values()) - hits
    if hits == 0:
        return 0.0, 0.0, 0.0
    precision, recall = hits / (hits + false), hits / (hits + missed)
    return 2 * precision * recall / (precision + recall), precision, recall
