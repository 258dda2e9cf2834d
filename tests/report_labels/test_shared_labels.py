"""Rule labels against labels of 80 reports by hand, and single changes to real sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.report_labels.findings import FINDINGS, Label
from llava.report_labels.labeler import label_report
from tests.support.iu_reports import iu_findings

PREDICATES: dict[str, Callable[[Label], bool]] = {
    "positive": lambda value: value == 1,
    "positive or uncertain": lambda value: value in (1, -1),
    "negative": lambda value: value == 0,
    "uncertain": lambda value: value == -1,
}


def micro_f1(expected: dict[str, dict[str, Label]], is_hit: Callable[[Label], bool]) -> float:
    """Return the F1 of one kind of value over all labeled cells."""
    texts = iu_findings()
    hits = false = missed = 0
    for uid, row in expected.items():
        labels = label_report(texts[uid]).labels
        for name, value in row.items():
            asked, given = is_hit(value), is_hit(labels[name])
            hits, false, missed = hits + (asked and given), false + (given > asked), missed + (asked > given)
    return 2 * hits / (2 * hits + false + missed)


@pytest.mark.parametrize(
    ("kind", "least"),
    [("positive", 0.97), ("positive or uncertain", 0.97), ("negative", 0.98), ("uncertain", 0.85)],
)
def test_labels_by_hand(shared: Path, kind: str, least: float) -> None:
    expected = json.loads((shared / "data" / "iu-labels" / "labels_shared.json").read_text())
    assert micro_f1(expected, PREDICATES[kind]) >= least


def real_sentences(pattern: str) -> list[str]:
    """Return the distinct real sentences that match a pattern from start to end."""
    found: dict[str, None] = {}
    for text in iu_findings().values():
        for sentence in re.split(r"(?<=\.)\s+", text):
            if re.fullmatch(pattern, sentence):
                found[sentence] = None
    return list(found)


def changed(before: str, after: str) -> dict[str, tuple[Label, Label]]:
    """Return the findings whose labels differ, without `No Finding`."""
    one, other = label_report(before).labels, label_report(after).labels
    return {name: (one[name], other[name]) for name in FINDINGS[:-1] if one[name] != other[name]}


def test_a_denial_less() -> None:
    words = r"(?:(?!no\b|without\b|change\b|interval\b|The\b)[^.(\s]+ )*[^.(\s]+"
    sentences = real_sentences(rf"(?:There (?:is|are) no|No) {words}\.")
    assert len(sentences) >= 500
    for sentence in sentences:
        stated = re.sub(r"^No ", "", re.sub(r"^(There (?:is|are)) no", r"\1", sentence))
        denied = {name for name, value in label_report(sentence).labels.items() if value == 0}
        found = changed(sentence, stated)
        assert set(found) == denied, sentence
        assert {pair[1] for pair in found.values()} <= {1, -1}, sentence  # of a list with "or", each is uncertain


def test_another_side() -> None:
    sentences = real_sentences(r"[^.]*\b(?:left|right)\b[^.]*\.")
    assert len(sentences) >= 500
    for sentence in sentences[:500]:
        swapped = re.sub(r"\b(left|right)\b", lambda side: {"left": "right", "right": "left"}[side[1]], sentence)
        assert changed(sentence, swapped) == {}, sentence


def test_a_doubt_more() -> None:
    names = r"(?:effusions?|pneumothorax|atelectasis|opacity|opacities|fractures?|pneumonia|scarring|edema|nodules?)"
    sentences = real_sentences(rf"There (?:is|are) (?!no\b)(?:(?!with\b|and\b|XXXX\b)[^.,\s]+ )*{names}(?: [^.,]*)?\.")
    sentences = [
        sentence for sentence in sentences if re.search(r"\b(?:with|there|and|represent\w*)\b", sentence) is None
    ]
    assert len(sentences) >= 100
    for sentence in sentences:
        doubtful = re.sub(r"^There (?:is|are) ", "There may be ", sentence)
        before = label_report(sentence).labels
        positive = {name for name in FINDINGS[:-1] if before[name] == 1}
        found = {name: pair[1] for name, pair in changed(sentence, doubtful).items()}
        assert found == dict.fromkeys(positive, -1), sentence
