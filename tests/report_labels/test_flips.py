"""Single changes to real sentences: a denial, a side or a doubt changes exactly the label that it should."""

from __future__ import annotations

import re
from functools import cache

from llava.report_labels.findings import FINDINGS, Label
from llava.report_labels.labeler import label_report
from tests.support.iu_reports import iu_findings

NUM_SENTENCES = 500


@cache
def all_sentences() -> tuple[str, ...]:
    """Return the distinct sentences of all reports."""
    return tuple({sentence: None for text in iu_findings().values() for sentence in re.split(r"(?<=\.)\s+", text)})


def real_sentences(pattern: str) -> list[str]:
    """Return the distinct real sentences that match a pattern from start to end."""
    return [sentence for sentence in all_sentences() if re.fullmatch(pattern, sentence)]


def changed(before: str, after: str) -> dict[str, tuple[Label, Label]]:
    """Return the findings whose labels differ, without `No Finding`."""
    one, other = label_report(before).labels, label_report(after).labels
    return {name: (one[name], other[name]) for name in FINDINGS[:-1] if one[name] != other[name]}


def test_a_denial_less() -> None:
    words = r"(?:(?!no\b|without\b|change\b|interval\b|The\b)[^.(\s]+ )*[^.(\s]+"
    sentences = real_sentences(rf"(?:There (?:is|are) no|No) {words}\.")
    assert len(sentences) >= NUM_SENTENCES
    for sentence in sentences:
        stated = re.sub(r"^No ", "", re.sub(r"^(There (?:is|are)) no", r"\1", sentence))
        denied = {name for name, value in label_report(sentence).labels.items() if value == 0}
        found = changed(sentence, stated)
        assert set(found) == denied, sentence
        assert {pair[1] for pair in found.values()} <= {1, -1}, sentence  # of a list with "or", each is uncertain


def test_another_side() -> None:
    sentences = real_sentences(r"[^.]*\b(?:left|right)\b[^.]*\.")
    assert len(sentences) >= NUM_SENTENCES
    for sentence in sentences:
        swapped = re.sub(r"\b(left|right)\b", lambda side: {"left": "right", "right": "left"}[side[1]], sentence)
        assert changed(sentence, swapped) == {}, sentence


SECOND = re.compile(r"[,;:(/]|\b(?:with|and|which|given|due)\b")
"""Where a second statement may begin."""

OTHER_CUES = re.compile(
    r"XXXX|:|\b(?:but|not?|without|change|may|could|or|versus|sugg\w+|represent\w*|likely|present the|is are)\b"
)
"""Words that deny or doubt, and sentences without a period between them."""

VERB = re.compile(
    r"\b(?:is|are|has|have|was|were|appears?|remains?|shows?|demonstrates?|terminat\w+|project\w*|overl\w+|measur\w+|"
    r"courses?|pass\w*|lies|extends?)\b"
)
SEEN = r"(?:again )?(?:noted|seen|present|identified|visualized|demonstrated)\b"
LARGE = (
    r"(?:(?:again|slightly|mildly|moderately|significantly|markedly|mild|overall|somewhat) )*"
    r"(?:enlarged|large|prominent|widened)\b"
)


def doubted(sentence: str) -> str | None:
    """Return a sentence of one statement with `may be` or `possible`; None if it is not such a sentence."""
    if match := re.match(r"There (?:is|are|has been|appears to be) ", sentence):
        return f"There may be {sentence[match.end() :]}"
    if match := re.search(rf" (?:(?:is|are) (?={SEEN})|(?:is|are|remains|appears) (?={LARGE}))", sentence):
        return f"{sentence[: match.start()]} may be {sentence[match.end() :]}"
    return None if VERB.search(sentence) else f"Possible {sentence[0].lower()}{sentence[1:]}"


def plain_findings(sentence: str) -> set[str]:
    """Return the findings of a sentence that states something before any second statement; empty for another one."""
    found = label_report(sentence)
    second = SECOND.search(sentence)
    is_first = second is None or (len(found.evidence) == 1 and found.evidence[0].end <= second.start())
    if OTHER_CUES.search(sentence) or not is_first or -1 in found.labels.values():
        return set()
    return {name for name in FINDINGS[:-1] if found.labels[name] == 1}


def test_a_doubt_more() -> None:
    num = 0
    for sentence in all_sentences():
        doubtful = doubted(sentence)
        if doubtful is None or not (findings := plain_findings(sentence)):
            continue
        num += 1
        assert {name: pair[1] for name, pair in changed(sentence, doubtful).items()} == dict.fromkeys(findings, -1), (
            doubtful
        )
    assert num >= NUM_SENTENCES


CERTAIN = {
    r"\b(?:[Pp]ossible|[Pp]robable|[Qq]uestionable|[Ss]uspected) ": "",
    r"\b(?:may|could|might) (?:represent|reflect)\b": "represents",
    r"\b(?:suggesting|suggestive of|suspicious for|concerning for)\b": "consistent with",
    r"\bmay be (?=due|secondary|related)": "is ",
}
OTHER_DOUBTS = re.compile(
    r"XXXX|/|\b(?:or|versus|no|not|without|possibly|likely|probably|stable|unchanged|concerning for possible)\b"
)


def test_a_doubt_less() -> None:
    num = 0
    for sentence in all_sentences():
        sure = [re.sub(old, new, sentence) for old, new in CERTAIN.items() if len(re.findall(old, sentence)) == 1]
        doubtful = {name for name, value in label_report(sentence).labels.items() if value == -1}
        if len(sure) != 1 or not doubtful or OTHER_DOUBTS.search(sentence):
            continue
        num += 1
        assert {name: pair[1] for name, pair in changed(sentence, sure[0]).items()} == dict.fromkeys(doubtful, 1), (
            sentence
        )
    assert num >= 30
