"""Rule labels: the 14 findings of a chest X-ray report, by mention and certainty rules.

    text --> sentences --> mentions --scopes--> value of each mention --> one label per finding, with evidence

The conventions are those of the published CheXpert rules. The labels are called rule labels; they are not the output
of the CheXpert or CheXbert labelers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from llava.report_labels.cues import STATE_PATTERN
from llava.report_labels.findings import (
    FINDINGS,
    NEGATIVE,
    NO_FINDING,
    POSITIVE,
    SUPPORT_DEVICES,
    UNCERTAIN,
    Evidence,
    Label,
    ReportLabels,
)
from llava.report_labels.heart import heart_values
from llava.report_labels.mentions import MENTION_FINDERS, NOT_FINDERS, OTHER_FINDER, SOFT_FINDERS
from llava.report_labels.scopes import Scopes, condition_spans, findings_parts, lower_case, plain_text, split_sentences

OTHER = "Other"
"""Evidence of an abnormality that none of the 14 findings covers."""

RULES_VERSION = "6"
"""Version of tables and rules, for results."""

_RANK = {POSITIVE: 3, UNCERTAIN: 2, NEGATIVE: 1}
_STABLE_RANK = 0
"""Rank of a heart or mediastinum that is only called stable; any other statement about it takes precedence."""


def label_report(text: str) -> ReportLabels:
    """Return the rule labels of a report.

    >>> labels = label_report("Mild cardiomegaly. No effusion or pneumothorax.").labels
    >>> labels["Cardiomegaly"], labels["Pleural Effusion"], labels["Fracture"]
    (1, 0, None)
    """
    text = plain_text(text)
    evidence: list[Evidence] = []
    for offset, stop in findings_parts(text):
        for start, end in split_sentences(text[offset:stop]):
            place = offset + start
            for finding, value, first, last, cue in _sentence_evidence(lower_case(text[place : offset + end])):
                evidence.append(Evidence(finding, value, place + first, place + last, " ".join(cue.split())))
    decided: dict[str, Evidence] = {}
    for part in evidence:
        known = decided.get(part.finding)
        if known is None or _rank(part) > _rank(known):
            decided[part.finding] = part
    labels: dict[str, Label] = {name: decided[name].value if name in decided else None for name in FINDINGS}
    is_abnormal = any(part.value != NEGATIVE for name, part in decided.items() if name != SUPPORT_DEVICES)
    if not is_abnormal and any(char.isalpha() for char in text):
        labels[NO_FINDING] = POSITIVE
    return ReportLabels(labels, tuple(part for part in evidence if part.finding != OTHER))


def _rank(part: Evidence) -> int:
    state = STATE_PATTERN.fullmatch(part.cue) if part.value == UNCERTAIN else None
    return _STABLE_RANK if state is not None and state.lastgroup == "stable" else _RANK[part.value]


@lru_cache(maxsize=1 << 14)
def _sentence_evidence(sentence: str) -> tuple[tuple[str, int, int, int, str], ...]:
    """Return finding, value, start, end and cue of each mention in a sentence in lower case."""
    conditions = condition_spans(sentence)
    mentions = [part for part in _mentions(sentence) if not _is_within(part[1:3], conditions)]
    others = [span for span in OTHER_FINDER.spans(sentence) if not _is_within(span, conditions)]
    places = [(start, end) for _, start, end, _ in mentions]
    scopes = Scopes(sentence)
    found = []
    for finding, start, end, soft in mentions:
        value, cue = scopes.assess(start, end, places)
        if soft and value == POSITIVE:
            value, cue = UNCERTAIN, sentence[start:end]
        found.append((finding, value, start, end, cue))
    found += heart_values(sentence, scopes)
    for start, end in others:
        value, cue = scopes.assess(start, end, [])
        found.append((OTHER, value, start, end, cue))
    return tuple(sorted(found, key=lambda part: part[2]))


def _is_within(span: tuple[int, int], places: Iterable[tuple[int, int]]) -> bool:
    return any(low <= span[0] and span[1] <= high for low, high in places)


def _mentions(sentence: str) -> Iterable[tuple[str, int, int, bool]]:
    """Yield finding, start, end and softness of the mentions of a sentence."""
    for finding, finder in MENTION_FINDERS.items():
        hard = finder.spans(sentence)
        soft = SOFT_FINDERS[finding].spans(sentence) if finding in SOFT_FINDERS else []
        if not hard and not soft:
            continue
        blocked = NOT_FINDERS[finding].spans(sentence) if finding in NOT_FINDERS else []
        for spans, is_soft in ((hard, False), (soft, True)):
            for start, end in spans:
                if sentence[end:].lstrip().startswith(":") and spans[-1][0] > end:  # a heading: `Fracture: no fracture`
                    continue
                if not any(low < end and start < high for low, high in blocked):
                    yield finding, start, end, is_soft
