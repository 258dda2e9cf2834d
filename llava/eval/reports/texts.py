"""Facts about report texts: most common sentence, repeats, lengths, priors and swapped sides."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llava.eval.reports.rows import ReportPair
from llava.report_labels.labeler import label_report
from llava.report_labels.scopes import split_sentences

PRIOR = re.compile(
    r"\b(?:unchanged|stable|again|previous(?:ly)?|prior|compar\w+|interval|new(?:ly)?|improv\w+|worsen\w+|persist\w+|"
    r"increas(?:ed|ing)|decreas(?:ed|ing)|resolv\w+|redemonstrat\w+|no longer|residual|since)\b",
    re.IGNORECASE,
)
"""Words that compare with an earlier examination, which the model does not see."""

_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def commonest_sentence(texts: Sequence[str]) -> str:
    """Return the most common sentence in its most common spelling; empty without texts."""
    counts: Counter[str] = Counter()
    spellings: dict[str, Counter[str]] = {}
    for text in texts:
        found = {" ".join(text[start:end].split()) for start, end in split_sentences(text)}
        for sentence in found:
            key = sentence.lower().rstrip(".")
            counts[key] += 1
            spellings.setdefault(key, Counter())[sentence] += 1
    if not counts:
        return ""
    best = max(counts, key=lambda key: (counts[key], key))
    return max(spellings[best], key=lambda spelling: (spellings[best][spelling], spelling))


def text_facts(pairs: Sequence[ReportPair]) -> dict[str, Any]:
    """Return shares and counts that the scores do not show.

    Keys: `distinct_predictions` and `commonest_prediction` (shares of the reports), `empty_predictions`, `length_ratio`
    (words of predictions by words of references), `prior_words` (share of reports with a comparison, by side), and
    `swapped_sides` (reports in which a finding is on the other side only).
    """
    num = len(pairs)
    predictions = Counter(pair.prediction for pair in pairs)
    words = [
        sum(len(text.split()) for text in side)
        for side in zip(*((p.prediction, p.reference) for p in pairs), strict=True)
    ]
    return {
        "distinct_predictions": len(predictions) / num,
        "commonest_prediction": max(predictions.values()) / num,
        "empty_predictions": sum(not pair.prediction.strip() for pair in pairs),
        "empty_references": sum(not pair.reference.strip() for pair in pairs),
        "length_ratio": words[0] / words[1] if words[1] else None,
        "prior_words": {
            "prediction": sum(PRIOR.search(pair.prediction) is not None for pair in pairs) / num,
            "reference": sum(PRIOR.search(pair.reference) is not None for pair in pairs) / num,
        },
        "swapped_sides": sum(has_swapped_side(pair.prediction, pair.reference) for pair in pairs),
    }


def has_swapped_side(prediction: str, reference: str) -> bool:
    """Return whether both texts place a finding, one on the left only and the other on the right only."""
    one, other = finding_sides(prediction), finding_sides(reference)
    return any(
        len(sides) == len(other.get(finding, ())) == 1 and sides != other[finding] for finding, sides in one.items()
    )


def finding_sides(text: str) -> dict[str, set[str]]:
    """Return the sides of each finding that a text states, from words in the same sentence."""
    sides: dict[str, set[str]] = {}
    if _SIDE.search(text) is None:
        return sides
    evidence = [part for part in label_report(text).evidence if part.value != 0]
    for start, end in split_sentences(text):
        named = {side.lower() for side in _SIDE.findall(text, start, end)}
        for part in evidence:
            if named and start <= part.start < end:
                sides.setdefault(part.finding, set()).update(named)
    return sides
