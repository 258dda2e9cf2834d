"""Parser of the report judge's replies: six counts per severity, or the reason why none were found.

Accepted are the two headers in any case, with or without Markdown, before six pairs in any brackets or none, on the
same line or not; JSON objects by severity; text around them; and reasoning before the answer. Every letter must occur
exactly once in each severity, with a whole number of at least 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llava.eval.reports.error_prompt import CATEGORIES
from llava.judging.parsing import without_reasoning
from llava.utils.typography import INVISIBLE, plain_typography

SEVERITIES = ("clinically_significant", "clinically_insignificant")

MAX_DIGITS = 6
"""Digits of a count; Python refuses to read integers of some thousands."""

UnreadReason = Literal["empty", "refused", "filtered", "cut short", "malformed"]

Counts = dict[str, int]

Rating = dict[str, Counts | None]
"""Counts by category for each severity; None where a severity has no readable counts."""


@dataclass(frozen=True, slots=True)
class Unread:
    """Reply without both lists of counts.

    Attributes:
        reason: why; it contains no text of the reply.
        rating: what could be read.
    """

    reason: UnreadReason
    rating: Rating


_HEADER = re.compile(
    r"(?:number\s+of\s+)?(?:clinically[\s_-]*)?(?P<kind>insignificant|in-significant|non-?significant|significant)"
    r"[\s_-]*errors?(?:\s*(?:by|per)\s*type)?[\s*_`\"']*[:=][\s*_`\"']*",
    re.IGNORECASE,
)
_PAIR = re.compile(
    r"(?<![A-Za-z])[\"'`*]*(?P<letter>[A-Fa-f])[\"'`*]*(?![A-Za-z])\s*[)\]}]?\s*"
    r"(?:[\"'`*]*(?:[A-Za-z]+[\s_]+)*[A-Za-z]{3,}[\"'`*]*\s*)?[,:=\-→>]*\s*[\"'`*]*(?P<count>[-+]?\d+(?:\.\d+)?)"
)
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am)?\s+(?:sorry|unable|not able)|i\s+(?:can(?:'|no)?t|can not|won't|will not)|as an ai|"
    r"(?:unable|not able) to (?:assist|provide|help|comply)|can(?:'|no)?t (?:assist|help|provide|comply)|"
    r"(?:must|have to) decline)\b",
    re.IGNORECASE,
)
_FILTER = re.compile(r"content[\s_-]*(?:filter|management policy)|responsible ai policy|was filtered", re.IGNORECASE)
_EXPLANATION = re.compile(r"\bexplanation", re.IGNORECASE)
_UNFINISHED = re.compile(r"(?:[,:(\[{]|\([A-Fa-f]?)\s*$")
_KEYS = {letter.lower(): name for letter, name in CATEGORIES.items()} | {name: name for name in CATEGORIES.values()}


def parse_rating(reply: str) -> Rating | Unread:
    """Return the counts of a reply, or why it has none."""
    text = without_reasoning(reply.translate(INVISIBLE))
    empty: Rating = dict.fromkeys(SEVERITIES)
    if text is None:
        return Unread("cut short", empty)
    if not text.strip():
        return Unread("empty", empty)
    plain = plain_typography(text)
    rating = _of_json(text) or _of_json(plain) or _of_headers(plain)
    if all(rating[severity] is not None for severity in SEVERITIES):
        return rating
    return Unread(_reason(plain), rating)


def _reason(text: str) -> UnreadReason:
    headers = list(_HEADER.finditer(text))
    if not headers and _FILTER.search(text):
        return "filtered"
    if not headers and _REFUSAL.search(text):
        return "refused"
    last = text[headers[-1].end() :] if headers else ""
    num_pairs = len(_PAIR.findall(last))
    if headers and (num_pairs < len(CATEGORIES) and (_UNFINISHED.search(text) or _is_open(last) or not last.strip())):
        return "cut short"
    kinds = {_severity(header) for header in headers}
    if len(kinds) == 1 and num_pairs == len(CATEGORIES) and SEVERITIES[0] in kinds:
        return "cut short"  # the reply ends after the first list
    if not headers and text.lstrip().startswith("{") and not text.rstrip().endswith("}"):
        return "cut short"
    return "malformed"


def _is_open(text: str) -> bool:
    """Return whether a list has more opening than closing brackets."""
    return sum(text.count(mark) for mark in "([{") > sum(text.count(mark) for mark in ")]}")


def _severity(header: re.Match[str]) -> str:
    return SEVERITIES[0] if header["kind"].lower() == "significant" else SEVERITIES[1]


def _of_headers(text: str) -> Rating:
    """Return the counts after each header.

    The last header of a kind counts, since models repeat the form first.
    """
    rating: Rating = dict.fromkeys(SEVERITIES)
    headers = list(_HEADER.finditer(text))
    ends = [*(header.start() for header in headers[1:]), len(text)]
    for header, end in zip(headers, ends, strict=False):  # without a header, one end remains
        part = text[header.end() : end]
        explanation = _EXPLANATION.search(part)
        counts = _of_pairs(part[: explanation.start()] if explanation else part)
        severity = _severity(header)
        if counts is not None or rating[severity] is None:
            rating[severity] = counts
    return rating


def _of_pairs(text: str) -> Counts | None:
    pairs = [(match["letter"].upper(), match["count"]) for match in _PAIR.finditer(text)]
    if sorted(letter for letter, _ in pairs) != list(CATEGORIES):
        return None
    if not all(count.isdigit() and len(count) <= MAX_DIGITS for _, count in pairs):
        return None
    by_letter = {letter: int(count) for letter, count in pairs}
    return {name: by_letter[letter] for letter, name in CATEGORIES.items()}


def _of_json(text: str) -> Rating | None:
    """Return the counts of the first JSON object with both severities; None without one."""
    for value in _objects(text):
        rating: Rating = dict.fromkeys(SEVERITIES)
        for key, part in value.items():
            name = re.sub(r"[^a-z]+", "_", str(key).lower())
            if "significant" in name:
                rating[SEVERITIES["insignificant" in name]] = _of_mapping(part)
        if any(counts is not None for counts in rating.values()):
            return rating
    return None


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(value, dict):
                yield value
        start = text.find("{", end)


def _of_mapping(part: Any) -> Counts | None:
    """Return counts from `{"A": 1, ...}`, `{"false_positive_finding": 1, ...}` or `[["A", 1], ...]`."""
    if isinstance(part, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in part):
        if len({str(pair[0]) for pair in part}) != len(part):
            return None
        part = {str(pair[0]): pair[1] for pair in part}
    if not isinstance(part, Mapping):
        return None
    counts: Counts = {}
    for key, count in part.items():
        # `A`, `(a)`, `A. false positive finding`, `false_positive_finding`
        words = re.sub(r"[^a-z]+", "_", str(key).lower()).strip("_")
        name = _KEYS.get(words) or _KEYS.get(words.partition("_")[2]) or _KEYS.get(words.partition("_")[0])
        if name is None or name in counts or isinstance(count, bool) or not isinstance(count, int) or count < 0:
            return None
        counts[name] = count
    return {name: counts[name] for name in CATEGORIES.values()} if len(counts) == len(CATEGORIES) else None
