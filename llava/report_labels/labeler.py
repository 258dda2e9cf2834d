"""Rule labels: the 14 findings of a chest X-ray report, by mention and certainty rules.

    text --> sentences --> mentions --scopes--> value of each mention --> one label per finding, with evidence

The conventions are those of the published CheXpert rules. The labels are called rule labels; they are not the output
of the CheXpert or CheXbert labelers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

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
from llava.report_labels.scopes import Scopes, lower_case, split_sentences

OTHER = "Other"
"""Evidence of an abnormality that none of the 14 findings covers."""

RULES_VERSION = "2"
"""Version of tables and rules, for results."""

_RANK = {POSITIVE: 3, UNCERTAIN: 2, NEGATIVE: 1}


def label_report(text: str) -> ReportLabels:
    """Return the rule labels of a report.

    >>> labels = label_report("Mild cardiomegaly. No effusion or pneumothorax.").labels
    >>> labels["Cardiomegaly"], labels["Pleural Effusion"], labels["Fracture"]
    (1, 0, None)
    """
    evidence: list[Evidence] = []
    for start, end in split_sentences(text):
        for finding, value, first, last, cue in _sentence_evidence(lower_case(text[start:end])):
            evidence.append(Evidence(finding, value, start + first, start + last, cue))
    labels: dict[str, Label] = dict.fromkeys(FINDINGS)
    is_abnormal = False
    for part in evidence:
        is_abnormal = is_abnormal or (part.finding != SUPPORT_DEVICES and part.value != NEGATIVE)
        if part.finding == OTHER:
            continue
        known = labels[part.finding]
        if known is None or _RANK[part.value] > _RANK[known]:
            labels[part.finding] = part.value
    if not is_abnormal and any(char.isalpha() for char in text):
        labels[NO_FINDING] = POSITIVE
    return ReportLabels(labels, tuple(part for part in evidence if part.finding != OTHER))


@lru_cache(maxsize=1 << 14)
def _sentence_evidence(sentence: str) -> tuple[tuple[str, int, int, int, str], ...]:
    """Return finding, value, start, end and cue of each mention in a sentence in lower case."""
    mentions, others = list(_mentions(sentence)), OTHER_FINDER.spans(sentence)
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
                if not any(low < end and start < high for low, high in blocked):
                    yield finding, start, end, is_soft
