"""Cleaning of generated answers that refer to the caption or the article instead of the image.

    answer --R1--> dropped | --R2--> cut at the front | --R3--> cut inside | --R4--> dropped | --R5--> kept

The phrases are those of LLaVA-Med 1.0, written as small grammars. Mode `legacy` applies them as the original does. Mode
`fixed` keeps what the original damages: capitals (MRI, not mri), a leading yes or no, the beginnings of sentences, and
answers that the original drops because a harmless phrase contains a forbidden one (a patient who feels sorry, access to
a vein, "a fuller description of").
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from llava.utils.lookup import lookup
from llava.utils.typography import plain_typography

RULES: dict[str, str] = {
    "R1 dropped": "says that the image or its text is not available",
    "R2 cut": "began with a reference to the text, which was removed",
    "R2 dropped": "began with such a reference, and still mentions the text",
    "R3 cut": "contained a reference to the text, which was removed",
    "R3 dropped": "contained such a reference, and still mentions the text",
    "R4 dropped": "mentions a caption or a description",
    "R5 kept": "mentions none of these",
    "empty dropped": "is empty after the removal (fixed mode)",
}
"""Outcomes that are counted, with their meanings."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """Result of the rules: the text (None: pair dropped), the outcome, and the deciding phrase."""

    text: str | None
    outcome: str
    phrase: str = ""


def _each(before: str, middles: str, after: str = "") -> list[str]:
    """Return `before + middle + after` for each of the middles, which are separated by bars."""
    return [before + middle + after for middle in middles.split("|")]


REFUSALS: tuple[str, ...] = (
    "having access",
    "without access",
    "have access",
    "access to the image",
    "access to the actual image",
    "without the actual image",
    "not mentioned in the figure caption",
    "not mentioned in the caption",
    "not provided in the figure caption",
    "not specified in the caption",
    "not specified in the image caption",
    "without seeing the",
    "cannot see the",
    "unable to view",
    "unable to provide specific details",
    "sorry",
    "cannot directly view",
    "cannot view the image",
    "image itself is not available",
    "image is not available",
)
"""R1: an answer that contains one of these in lower case is dropped."""


def _prefixes() -> list[str]:
    after_any = [
        *_each("according to the ", "description|image description|figure caption|context provided", ", "),
        *_each("based on the ", "description|context provided", ", "),
        "the context provided indicates that ",
        "the figure caption mentions ",
    ]
    after_yes = [
        "according to the figure and the provided context, ",
        *_each("the context provided ", "mentions that |mentions |suggests that "),
    ]
    alone = [
        *_each("according to the ", "description provided|provided context|image and the provided context", ", "),
        *_each("according on the ", "caption|figure caption", ", "),
        *_each("based on the ", "description provided|image description|figure caption|caption", ", "),
        *_each("based on the ", "provided context|information provided", ", "),
        *_each("based on the ", "image|ct scan|histopathological features", " and the context provided, "),
        *_each("based on the ", "image|mri|ct image|histologic section", " and the provided context, "),
        "the figure caption describes ",
        "the caption mentions ",
        *_each("the ", "image description|description", " suggests that "),
        "the outcome mentioned in the description is that ",
        "the image and context provided suggest that ",
        "the provided context mentions that ",
        "the image, along with the provided context, suggests that ",
        "the histology image and the provided context suggest that ",
        "in the provided context, ",
        "i cannot see the image, but based on the description, ",
    ]
    found = [start + rest for start in ("", "yes, ", "no, ") for rest in after_any]
    found += [start + rest for start in ("", "yes, ") for rest in after_yes]
    found += [*alone, "no, the image and the provided context indicate that "]
    return [*found, "yes, there is another finding mentioned in the context, "]


def _infixes() -> list[str]:
    sources = "context provided|provided context"
    in_context = (
        "figure caption|image caption|image provided|chest X-ray provided|provided image|provided information|"
        "provided MRI image|MRI image provided|information provided|CT scan provided|CT scans provided"
    )
    relations = (
        "based on|but based on|considering|given|in|which is a characteristic appearance in|"
        "which is also mentioned in|which is"
    )
    return [
        *_each(", as mentioned in the ", f"description|image description|figure caption|{sources}"),
        *_each(" as mentioned in the ", "figure caption|caption"),
        *_each(" mentioned in the ", "figure caption|caption"),
        *_each(" the ", "figure |image |", "caption suggests that"),
        ", but based on the description",
        " based on the figure caption,",
        *_each(", as indicated ", "by|in", " the image description"),
        ", as indicated by the provided context",
        *_each(", as described in the ", "provided context|context"),
        ", as suggested by the context provided",
        ", according to the provided context",
        *_each(", ", relations, " the context provided"),
        *_each(" ", "can be found in|in", " the provided context"),
        " in the context of the provided information",
        " found in the context provided",
        " the context provided mentions",
        *_each("In the context of the ", in_context, ", "),
        *_each("In the ", sources, ", "),
        *_each("According to the ", sources, ", "),
        *_each("Based on the ", sources, ", "),
        *_each("based on the ", sources, ", "),
        *_each("The context provided ", "indicates that |mentions |only mentions that |suggests that "),
        "the context provided suggests that ",
        "the additional context provided indicates that ",
        "It is important to note that the context provided indicates that ",
        "The image and context provided suggest that ",
    ]


PREFIXES: tuple[str, ...] = tuple(sorted(_prefixes(), key=len, reverse=True))
"""R2: beginnings that are removed, in lower case, longest first."""

INFIXES: tuple[str, ...] = tuple(sorted(_infixes(), key=len, reverse=True))
"""R3: parts that are removed, case-sensitive, longest first."""

FORBIDDEN = ("description", "caption")
"""R2, R3, R4: an answer that contains one of these after the removal is dropped."""


def clean_legacy(answer: str) -> Cleaned:
    """Apply the rules as LLaVA-Med 1.0 does."""
    lower = answer.lower()
    for phrase in REFUSALS:
        if phrase in lower:
            return Cleaned(None, "R1 dropped", phrase)
    for phrase in PREFIXES:
        if lower.startswith(phrase):
            return _decide("R2", answer[len(phrase) :].capitalize(), phrase, forbidden=_legacy_forbidden)
    text, first = answer, ""
    for phrase in INFIXES:
        if phrase in text:
            text, first = text.replace(phrase, ""), first or phrase
    if first:
        return _decide("R3", text, first, forbidden=_legacy_forbidden)
    word = _legacy_forbidden(answer)
    return Cleaned(None, "R4 dropped", word) if word else Cleaned(answer, "R5 kept")


def _legacy_forbidden(text: str) -> str:
    return next((word for word in FORBIDDEN if word in text), "")


def _decide(rule: str, text: str, phrase: str, *, forbidden: Callable[[str], str]) -> Cleaned:
    word = forbidden(text)
    return Cleaned(None, f"{rule} dropped", word) if word else Cleaned(text, f"{rule} cut", phrase)


_SIGHT = (
    r"(?:(?:the|this|that|an?|any|your|its) )?(?:(?!(?:in|on|from|of)\b)[\w-]+ ){0,2}"
    r"(?:image|figure|picture|photo|photograph|scan|slide|film|x-ray|radiograph|caption|context|text)s?\b"
)
_UNSEEN = r"\b(?:without seeing|(?:cannot|can't|unable to) (?:directly )?(?:see|view))"
_REFUSED = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:having|have|has|without|direct|no) access to {_SIGHT}",
        r"\b(?:i|we) (?:do not|don't|did not|didn't|cannot|can't) have (?:direct )?access\b",
        r"\baccess to the (?:actual )?image\b",
        r"\bwithout the actual image\b",
        r"\bnot (?:mentioned|provided|specified) in the (?:figure |image )?caption\b",
        rf"{_UNSEEN} {_SIGHT}",
        rf"{_UNSEEN} (?:it|them)\b",
        r"\bunable to provide specific details\b",
        r"\bi(?:'m| am) (?:\w+ )?sorry\b",
        r"^\W*sorry\b",
        r"\bimage (?:itself )?is not available\b",
    )
)
_SPEAKS_OF_TEXT = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bcaptions?\b",
        r"\b(?:image|figure|provided|given|above|accompanying) descriptions?\b",
        r"\b(?:the|this|your) descriptions?\b(?! of\b)",
    )
)
_POLARITY = re.compile(r"(?:yes|no), ")
_SENTENCE_END = ".!?\n"


def clean_fixed(answer: str) -> Cleaned:
    """Apply the rules without the original's defects."""
    plain = plain_typography(answer)
    for pattern in _REFUSED:
        if found := pattern.search(plain):
            return Cleaned(None, "R1 dropped", found[0].lower())
    lower = answer.lower()
    if len(lower) == len(answer):  # lower case may change the length, and with it the offsets
        for phrase in PREFIXES:
            if lower.startswith(phrase):
                return _cut_front(answer, phrase)
    text, first = answer, ""
    for phrase in INFIXES:
        if phrase in text:
            text, first = _cut_inside(text, phrase), first or phrase
    text = text.strip()
    if not any(letter.isalnum() for letter in text):
        return Cleaned(None, "empty dropped", first)
    if first:
        return _decide("R3", text, first, forbidden=_fixed_forbidden)
    word = _fixed_forbidden(answer)
    return Cleaned(None, "R4 dropped", word) if word else Cleaned(text, "R5 kept")


def _cut_front(answer: str, phrase: str) -> Cleaned:
    """Remove a beginning but keep a yes or no before it."""
    kept = _POLARITY.match(phrase)
    rest = answer[len(phrase) :].strip()
    if not any(letter.isalnum() for letter in rest):
        return Cleaned(None, "empty dropped", phrase)
    text = answer[: kept.end()] + rest if kept else rest
    return _decide("R2", text[:1].upper() + text[1:], phrase, forbidden=_fixed_forbidden)


def _cut_inside(text: str, phrase: str) -> str:
    """Remove all occurrences of a part; a word that then begins a sentence is capitalized."""
    first, *others = text.split(phrase)
    joined = first
    for other in others:
        before = joined.rstrip(" ")
        gap = joined[len(before) :]
        starts = not before or before[-1] in _SENTENCE_END
        joined = before + (gap + _capital(other) if starts else _joint(before, gap, other))
    return joined


def _capital(text: str) -> str:
    """Return a text with its first letter capitalized; leading spaces are kept."""
    bare = text.lstrip(" ")
    return text[: len(text) - len(bare)] + bare[:1].upper() + bare[1:]


def _joint(before: str, gap: str, after: str) -> str:
    """Return the text after a removed part, without a second comma or space at the joint."""
    if before.endswith(",") and after.startswith(","):
        return after[1:]
    return gap + after.lstrip(" ") if gap else after


def _fixed_forbidden(text: str) -> str:
    for pattern in _SPEAKS_OF_TEXT:
        if found := pattern.search(text):
            return found[0].lower()
    return ""


MODES: dict[str, Callable[[str], Cleaned]] = {"legacy": clean_legacy, "fixed": clean_fixed}
"""Cleaning functions by mode."""


def clean_answer(answer: str, mode: str) -> Cleaned:
    """Apply the rules of a mode in `MODES` to one answer."""
    return lookup(MODES, mode, "cleaning mode")(answer)
