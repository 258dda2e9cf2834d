"""Sentences of a report, and the reach of cues within a sentence.

    text --split_sentences--> sentence --Scopes--> assess(start, end) = value of a mention and the deciding words

A cue before a mention reaches it unless a stop (`but`, `with`, `there is`, a new clause) is between them; a cue after
it reaches back within the clause, and through a list.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from llava.report_labels.cues import CUE_PATTERN, NOT_STOPS, STOPS
from llava.report_labels.findings import NEGATIVE, POSITIVE, UNCERTAIN
from llava.utils.typography import plain_typography

_END = re.compile(
    r"(?<!\b[ap])(?<!\bvs)(?<!\bdr)(?<!\bapprox)[.!?;]+(?=\s|$|[a-z]{2})(?<!\bvs\.)|\n\s*\n",
    re.IGNORECASE,
)
_STARTS = (
    r"(?:There|The|No|Heart|Lungs?|Mediastin\w+|Cardi\w+|Pulmonary|Bony|Osseous|Normal|Mild|Stable|Bilateral|"
    r"Visuali[sz]ed|Negative|Clear|Left|Right|Small|Aorta|Trachea|Pleura\w*)"
)
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_NEW = re.compile(  # with a space or line break but no period, or glued: `Small effusionNo pneumothorax`
    rf"\b[a-z]+(?:\s|<(?:br|BR)\s?/?>)+(?={_STARTS}\s[a-z])|\b[a-z]{{4,}}(?={_STARTS}\s[a-z])"
)
_BULLET = re.compile(r"\s[-\u2022*]+\s+(?=[A-Z])(?!None\b|Absent\b|Negative\b)")
_CONTRACTION = re.compile(r"\b[a-z]+n't\b")
_ASKED_BEFORE = re.compile(  # a mark of doubt before a word: `? pneumonia`, `opacity, ?atelectasis`
    r"(?<![^\s(,:;/-])\?+(?=\w)|(?:\A|(?<=[(,:;/-])|(?<=[.,:;/-]\s))\?+(?=\s\w)|(?<=\s)\?+(?=\s[a-z])"
)
_LOST_QUOTES = re.compile(r"(?<=\w\s)\?(\w[^?.]{0,60}\s[^?.]{0,60}\w)\?(?=[\s,.;:)])")
"""Quotes that a conversion of the text replaced: `opacities and ?ground-glass opacities?, with`."""

_ASKED_AFTER = re.compile(r"(?<=\w)\?+(?=\s*[),/])")
_ASKED = re.compile(r"(?<=[^\s(,:;/-])\?+\s*\Z|(?<=\w\s)\?+\s*\Z")

_CLAUSE = re.compile(  # a new clause with its own verb, which the predicate of a list ("A, B or C is seen") is not
    r"(?:,|\band)\s+(?:the\s+|a\s+|an\s+)?(?!no\b|without\b|or\b|and\b)\w+(?:\s+(?!or\b|and\b)\w+){0,3}?\s+"
    r"(?:(?:persists?|remains?)(?=[.\s]*\Z)|(?:is|are|was|were|has|have|appears?|remains?|shows?|demonstrates?)\s+)"
    r"(?!(?:not\s+)?(?:seen|identified|noted|present|visuali|appreciat|demonstrat|evident|detect|observed|found|visible))"
)
_COMMA = r",(?<!\bstable,)(?<!\bsmall,)(?<!\bmild,)(?<!\bminimal,)(?<!\bchronic,)(?<!\bold,)(?<!\bnew,)"
"""Comma, but not one between adjectives as in `a small, stable effusion`."""

_ITEM = re.compile(  # an item that is stated, after a list that is denied
    rf"(?:{_COMMA}|\s-+\s)\s*(?:and\s+)?(?:a\s+)?"
    r"(?:now|stable|unchanged|persistent|mild\w*|moderate\w*|minimal\w*|small|chronic|old|healed|calcified|"
    r"scattered|degenerative|low|tortuous|again|interval|improv\w+|increas\w+|decreas\w+|residual|possible|"
    r"probable|questionable|irregular|coarse\w*|prominent)\b(?![^.]*\b(?:or|nor)\b)"
    r"|\band\s+(?:a\s+)?(?:possible|probable)\b(?![^.]*\bor\b)"
    r"|,\s*(?:the\s+)?(?:heart|lungs?|bones?|mediastinum)(?:\s+size)?\s+"
    r"(?:normal|clear|intact|unremarkable|enlarged|stable)\b"
)
_AND_ITEM = re.compile(  # the same after `and`; a doubt reaches through it: `likely atelectasis and small effusion`
    r"\band\s+(?:a\s+)?(?:stable|unchanged|persistent|mild\w*|small|minimal\w*)\b(?![^.]*\bor\b)"
)
_LIST = re.compile(r"[^,]*(?:,[^,]*)*,?\s*\b(?:or|and|nor)\b[^,]*(?:\b(?:both|others?),\s*)?")
_JOINED = re.compile(r"^[^,;:]{0,40}?(?:\band/or\b|\bor\b|\bversus\b|\bvs\b\.?)[^,;:]{0,40}$")
_VERB = re.compile(r"\b(?:is|are|was|were|has|have|may|could|might|appears?|represents?|with|without|no|which)\b")
_VERSUS_AFTER = re.compile(r"^(?P<between>[^,;:.]{0,40}?)\b(?:versus|vs)\b")
_OTHER_SUBJECT = re.compile(r"\band\s+(?:the|a|an)\b")
_SINGULAR = re.compile(r"(?:is|was|has)\b")
"""A verb of the last of two things only: `an opacity is present and the heart border is not seen`."""

_LATER = re.compile(
    r"(?: \w+){0,2}, (?:which|now|since|and now|but now|essentially|completely|fully|entirely|subsequently) "
)
"""What is between a finding and the end of it: `edema, now resolved`, `a pneumothorax, which has resolved`."""

_ENDED = ("resolved", "cleared", "disappeared", "removed")

_HEADING = re.compile(r"\s*:\s*")
_COLON = re.compile(r":\s|\(")
_AND = re.compile(r"\band\b(?!/or)")
_VERSUS_BEFORE = re.compile(r"\b(?:versus|vs)\b\W+(?:\w+\W+){0,3}$")
_TERMS = (
    r"(?:scar\w*|thickening|granuloma\w*|artifact\w*|shadows?|overlap\w*|crowding|summation|confluence|vessels?|nipples?|"
    r"aspiration|hemorrhage|contusion|fat|process|etiology|pericardial effusions?|both)\b"
)
_TERM_AFTER = re.compile(
    rf"^(?P<between>[\s/-]*(?:[\w-]+\s+){{0,3}}?)(?:and/or|or),?\s+(?:less\s+\w+,?\s+)?(?:[\w-]+\s+){{0,3}}?{_TERMS}"
)
_TERM = re.compile(rf"\b{_TERMS}")
_TERM_BEFORE = re.compile(rf"\b{_TERMS}\s+(?:and/or|or|versus|vs)\s+(?:[\w-]+\s+){{0,3}}?$")
"""Other alternatives to a mention."""

_NO_ITEM = r"(?:is|are|was|were|has|have|may|could|might|appears?|represents?|with|without|no|which|and|or)\b"
_ITEM_WORDS = rf"(?:[\s-]*\b(?!{_NO_ITEM})[\w/]+){{1,6}}?"
_LAST_ITEM = rf"(?:\s+(?!{_NO_ITEM})[\w/-]+){{1,6}}?(?=\s*(?:[.,;)]|\Z|\b(?:is|are|in|at|of|on|with|and|cannot)\b))"
_OR_LIST = re.compile(rf"{_ITEM_WORDS}(?:,{_ITEM_WORDS}){{0,5}},?\s+(?:and/or|or|versus|vs\.?)(?=\s){_LAST_ITEM}")
"""Alternatives after a doubt: `A, B or C`."""
_COMMA_OR_LIST = re.compile(rf"{_ITEM_WORDS}(?:,{_ITEM_WORDS}){{1,5}},\s+(?:and/or|or)(?=\s){_LAST_ITEM}")
"""Three or more alternatives by themselves: `A, B, or C`."""

MAX_SENTENCE = 600
"""Maximum characters of a sentence; the longest in the Indiana University reports has 254."""

MAX_JOINED = 100
"""Characters between two alternatives; more than `_JOINED` matches."""

NEAR = 64
"""Reach of a single adjective of uncertainty in characters."""


_SECTION = re.compile(  # headers of what was known before the image was read, and of what was seen
    r"(?:^|(?<=[.\n]))[ \t]{0,9}(?P<earlier>indications?|clinical (?:history|information|indication)|history|"
    r"reason for (?:the )?(?:exam\w*|study)|technique|comparison|examination|exam|procedure)[ \t]?:|"
    r"\b(?P<seen>findings?|impression|conclusion|report)[ \t]?:",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"\bif\b(?! any\b| present\b)[^,;]*?(?=[,;]|\bconsider|\brecommend|\bthen\b|$)")
_HIDDEN = re.compile(  # what could be hidden, up to the next statement
    r"\b(?:could|may|might|can|would)(?: \w+ly)? (?:obscure|hide|mask)\b"
    r"(?:(?!\b(?:but|however|although|though|while|whereas|yet|with|which|there (?:is|are|was|were))\b"
    r"|(?:,|\band)\s+(?:\w+\s+){1,4}(?:is|are|was|were|has|have|remains?)\b)[^;])*"
)

_MISSED = re.compile(  # `small nodules may be missed`
    r"(?:\b(?!(?:but|however|although|though|while|and|with|is|are)\b)[\w-]+\s+){1,4}(?:could|may|might|can|would)"
    r"\s+(?:easily\s+)?be\s+(?:missed|overlooked|obscured|hidden|masked|occult)\b"
)


def findings_parts(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of the parts of a report without indication, history, technique and comparison."""
    start, left_out = 0, None
    for match in _SECTION.finditer(text) if ":" in text else ():
        if match["seen"] is None:
            left_out = match.start() if left_out is None else left_out
        elif left_out is not None:  # without such a header, nothing is left out
            yield start, left_out
            start, left_out = match.start("seen"), None
    yield start, len(text)


def condition_spans(sentence: str) -> list[tuple[int, int]]:
    """Return the spans that state nothing: conditions (`if there is a mass`), `could hide a nodule`."""
    found = [match.span() for match in _CONDITION.finditer(sentence)] if "if " in sentence else []
    if any(word in sentence for word in (" obscure", " hide", " mask")):
        found += [match.span() for match in _HIDDEN.finditer(sentence)]
    if " be " in sentence:
        found += [match.span() for match in _MISSED.finditer(sentence)]
    return found


def split_sentences(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of the sentences of a text, also where a period or a space is missing.

    A sentence of more than `MAX_SENTENCE` characters is cut, since the time of the rules grows with its square.
    """
    start = 0
    marks = {match.start() for match in _ASKED_BEFORE.finditer(text)} if "?" in text else set()
    ends = {match.end() for match in _END.finditer(text) if match.start() not in marks}
    cuts = sorted(ends.union(match.end() for pattern in (_NEW, _BULLET) for match in pattern.finditer(text)))
    for end in [*cuts, len(text)]:
        while end - start > MAX_SENTENCE:
            cut = text.rfind(" ", start + 1, start + MAX_SENTENCE)
            cut = start + MAX_SENTENCE if cut < 0 else cut
            yield start, cut
            start = cut
        if text[start:end].strip():
            yield start, end
        start = end


def plain_text(text: str) -> str:
    """Return a text with plain quotes, hyphens and spaces; every character keeps its place."""
    text = plain_typography(text)
    return _LOST_QUOTES.sub(r'"\1"', text) if text.count("?") > 1 else text


def lower_case(text: str) -> str:
    """Return a text in lower case, `<BR>` as spaces, `isn't` as `not`; every character keeps its place."""
    lower = text.lower()
    if len(lower) != len(text):  # a few capitals have longer lower case forms
        lower = "".join(low if len(low := char.lower()) == 1 else char for char in text)
    if "n't" in lower:
        lower = _CONTRACTION.sub(lambda match: "not".ljust(len(match.group())), lower)
    return _BREAK.sub(lambda match: " " * len(match.group()), lower)


@dataclass(frozen=True, slots=True)
class Cue:
    """Cue in a sentence: its kind (a key of `CUES`) and place."""

    kind: str
    start: int
    end: int
    text: str


def _direction(cue: Cue, mentions: list[tuple[int, int]]) -> str:
    """Return the kind of a cue; some point to the other side where theirs has no mention.

    `An effusion would be difficult to exclude`, `at the base may be seen an opacity`.
    """
    if cue.kind == "uncertain_before" and cue.text.endswith(("exclude", "rule out")):
        return cue.kind if any(start >= cue.end for start, _ in mentions) else "uncertain_after"
    if cue.text.lstrip(", ").startswith("if "):
        is_next = any(end + 1 >= cue.start >= end for _, end in mentions)
        return cue.kind if not is_next and any(start >= cue.end for start, _ in mentions) else "uncertain_after"
    if cue.kind == "uncertain_after" and cue.text.startswith(("may", "might", "could")):
        return cue.kind if any(end <= cue.start for _, end in mentions) else "uncertain_before"
    return cue.kind


class Scopes:
    """Cues and stops of one sentence in lower case."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence
        self.cues = [
            Cue(str(match.lastgroup), match.start(), match.end(), match.group())
            for match in CUE_PATTERN.finditer(sentence)
        ]
        if "?" in sentence:
            for kind, mark in (("uncertain_near", _ASKED_BEFORE), ("uncertain_after", _ASKED_AFTER)):
                self.cues += [Cue(kind, *match.span(), "?") for match in mark.finditer(sentence)]
        self.is_question = "?" in sentence and _ASKED.search(sentence) is not None
        blocked = NOT_STOPS.spans(sentence)
        words = [first for first, _ in STOPS.spans(sentence) if not any(low <= first < high for low, high in blocked)]
        colons = [match.start() for match in _COLON.finditer(sentence)]
        self.stops = sorted(words + colons)
        self.clauses = sorted(m.start() for pattern in (_CLAUSE, _ITEM) for m in pattern.finditer(sentence))
        lists = _COMMA_OR_LIST.finditer(sentence) if ", or " in sentence or ", and/or " in sentence else ()
        self.lists = [match.span() for match in lists]
        self.items = [match.start() for match in _AND_ITEM.finditer(sentence)]

    def assess(self, start: int, end: int, mentions: list[tuple[int, int]]) -> tuple[int, str]:
        """Return the value of the mention in `[start, end)` and the deciding words; empty for a plain mention.

        Args:
            start: first character of the mention.
            end: character after it.
            mentions: places of all mentions of the sentence, for lists and alternatives.
        """
        if self.is_question:
            return UNCERTAIN, "?"
        if (cue := self._after_colon(end, mentions)) is not None:
            return (NEGATIVE if cue.kind.startswith("denied") else UNCERTAIN), cue.text
        doubt = self._doubt(start, end, mentions)
        if doubt is not None and ("exclude" in doubt or "ruled out" in doubt):
            return UNCERTAIN, doubt
        denied = self._denied(start, end)
        if denied is not None:
            return NEGATIVE, denied
        if doubt is not None:
            return UNCERTAIN, doubt
        return POSITIVE, ""

    def _after_colon(self, end: int, mentions: list[tuple[int, int]]) -> Cue | None:
        """Return the cue that alone follows a heading: `Effusion: possible`, `Pneumothorax: no evidence`."""
        colon = _HEADING.match(self.sentence, end)
        if colon is None or any(start > end for start, _ in mentions):
            return None
        return next((cue for cue in self.cues if cue.start == colon.end() and cue.kind != "none"), None)

    def _denied(self, start: int, end: int) -> str | None:
        for cue in self.cues:
            if cue.kind == "denied_before" and cue.end <= start and not self._stopped(cue.end, start, clauses=True):
                if cue.text == "not" and self._doubted_between(cue.end, start):
                    continue
                return cue.text
            if cue.text in ("resolved", "removed") and cue.end <= start and self._is_near(cue.end, start):
                return cue.text
            if cue.kind == "denied_after" and cue.start < start and end <= cue.end:  # "is not engorged"
                return cue.text
            if cue.kind == "denied_after" and cue.start >= end:
                ends = cue.text.endswith(_ENDED) and _LATER.fullmatch(self.sentence, end, cue.start)
                if ends or self._reaches_back(end, cue.start):
                    return cue.text
        return None

    def _doubt(self, start: int, end: int, mentions: list[tuple[int, int]]) -> str | None:
        found = None
        for cue in self.cues:
            kind = _direction(cue, mentions)
            before, after = cue.end <= start, cue.start >= end
            if (
                (before and kind == "uncertain_before" and not self._stopped(cue.end, start))
                or (before and kind == "uncertain_near" and self._is_near(cue.end, start))
                or (before and kind == "uncertain_near" and self._is_listed(cue.end, start, end))
                or (after and kind == "uncertain_after" and self._reaches_back(end, cue.start))
            ):
                found = cue.text
        return found or self._alternative(start, end, mentions)

    def _is_near(self, end: int, start: int) -> bool:
        between = self.sentence[end:start]
        return len(between) <= NEAR and re.search(_COMMA, between) is None and _VERB.search(between) is None

    def _is_listed(self, first: int, start: int, end: int) -> bool:
        """Return whether a mention is in a list of alternatives that begins at `first`: `possible A, B, or C`."""
        items = _OR_LIST.match(self.sentence, first)
        return items is not None and end <= items.end() and not self._stopped(first, start, clauses=True)

    def _doubted_between(self, end: int, start: int) -> bool:
        return any(cue.kind.startswith("uncertain") and end <= cue.start < start for cue in self.cues)

    def _stopped(self, end: int, start: int, *, clauses: bool = False) -> bool:
        """Return whether a stop is between a cue that ends at `end` and a mention."""
        if any(end <= stop < start for stop in self.stops):
            return True
        if any(end <= clause < start for clause in self.clauses):
            return True
        if clauses:  # a denial does not reach through a doubt, nor a doubt through a denial or "no change in"
            return any(end <= item < start for item in self.items)
        return any(cue.kind in ("denied_before", "none") and end <= cue.start < start for cue in self.cues)

    def _reaches_back(self, end: int, start: int) -> bool:
        """Return whether a cue at `start` reaches back to a mention that ends at `end`."""
        between = self.sentence[end:start]
        if any(end <= stop < start for stop in self.stops):
            return False
        if any(cue.kind in ("denied_before", "uncertain_before") and end <= cue.start < start for cue in self.cues):
            return False
        if _OTHER_SUBJECT.search(between) and _SINGULAR.match(self.sentence, start):
            return False
        return "," not in between or _LIST.fullmatch(between) is not None

    def _alternative(self, start: int, end: int, mentions: list[tuple[int, int]]) -> str | None:
        """Return the word that makes a mention one of two alternatives."""
        unchanged = any(
            cue.kind == "none" and cue.end <= start and not self._stopped(cue.end, start) for cue in self.cues
        )
        for other_start, other_end in [] if unchanged else mentions:  # "no change in A or B" states both
            first, last = (end, other_start) if other_start >= end else (other_end, start)
            is_near = first <= last <= first + MAX_JOINED
            if is_near and self._is_plain(first, last, mentions) and _JOINED.match(self.sentence[first:last]):
                return "or"
        if not unchanged and self._is_one_of_three(start, end, mentions):
            return "or"
        after = self.sentence[end:]
        for pattern, word in ((_VERSUS_AFTER, "versus"), (_TERM_AFTER, "or")):
            match = pattern.match(after)
            if match and self._is_plain(end, end + match.end("between"), mentions):
                return word
        before = self.sentence[:start]
        if _VERSUS_BEFORE.search(before):
            return "versus"
        return "or" if _TERM_BEFORE.search(before) else None

    def _is_one_of_three(self, start: int, end: int, mentions: list[tuple[int, int]]) -> bool:
        """Return whether a mention and two others are a list with a comma before its `or`: `A, B, or C`."""
        for first, last in self.lists:
            places = [*mentions, *(match.span() for match in _TERM.finditer(self.sentence))]
            within = sorted(place for place in places if first <= place[0] and place[1] <= last)
            num_apart = sum("," in self.sentence[one[1] : other[0]] for one, other in itertools.pairwise(within))
            if num_apart >= 2 and (start, end) in within:
                return True
        return False

    def _is_plain(self, start: int, end: int, mentions: list[tuple[int, int]]) -> bool:
        """Return whether neither a verb nor another mention nor the word `and` is between two places."""
        between = self.sentence[start:end]
        if _VERB.search(between) or _AND.search(between):
            return False
        return not any(start <= first < end for first, _ in mentions)
