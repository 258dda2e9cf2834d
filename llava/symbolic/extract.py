"""Extraction of the value of a node from a text, with negation and uncertainty inside of clauses.

text --normalize--> matches of the rules --cues of the clause--> candidates --highest priority--> value
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from llava.symbolic.clauses import ClauseContext, Span
from llava.symbolic.cue_lists import read_cues
from llava.symbolic.pattern_steps import MAX_TEXT
from llava.symbolic.structure import CONFLICT, NO_MATCH, ExtractRule, RuleNode
from llava.utils.typography import APOSTROPHES

MAX_MATCHES = 20_000
"""Maximum number of matches in a text that are looked at: five for each of its characters."""

NEGATED_PRIORITY = 0.5
"""Amount subtracted from a negated match's priority, so that a positive mention of another value wins."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """Value read from a text: a node's value, `__no_match__` or `__conflict__`, and its uncertainty."""

    value: str
    hedged: bool = False


def normalize(text: str) -> str:
    """Return a text as lower-case NFKC, cut to `MAX_TEXT`, single-spaced, without invisible characters."""
    text = text[:MAX_TEXT]
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFKC", text).translate(APOSTROPHES)
        text = "".join(_visible(character) for character in text)
    return " ".join(text.lower().split())[:MAX_TEXT]


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    return "" if category == "Cf" else " " if category in ("Cc", "Cs") else character


def extract(node: RuleNode, text: str) -> Extraction:
    """Return the value that a text gives to a node.

    Example::

        extract(rules.node("diagnosis"), "AML, not MM.")  # Extraction("AML", hedged=False)
    """
    return _extracted(node, text[:MAX_TEXT])  # the cache keeps its texts


@lru_cache(maxsize=8192)
def _extracted(node: RuleNode, text: str) -> Extraction:
    text = normalize(text)
    found = _tagged(node, text) if node.answer_format == "tag" else _candidates(node, text)
    if not found:
        return Extraction(NO_MATCH)
    top = max(priority for priority, _, _ in found)
    winning = [(value, hedged) for priority, value, hedged in found if priority == top]
    hedged = all(hedged for _, hedged in winning)
    if len({value for value, _ in winning}) > 1:
        return Extraction(CONFLICT, hedged)
    if hedged and node.uncertain != "value":
        return Extraction((node.abstain if node.uncertain == "abstain" else None) or NO_MATCH, hedged)
    return Extraction(winning[0][0], hedged)


def fired(node: RuleNode, text: str) -> list[tuple[str, str]]:
    """Return value and pattern of every match that is not negated, whatever its priority."""
    text = normalize(text)
    found = [
        (rule, pattern.pattern, match.span())
        for rule in node.extract
        for pattern in rule.patterns
        for match in pattern.finditer(text)
    ]
    context = _context(node, text, [span for _, _, span in found])
    return [
        (rule.value, pattern)
        for rule, pattern, span in found
        if not rule.only_negated and not (rule.negatable and context.is_negated(span))
    ]


def _tagged(node: RuleNode, text: str) -> list[tuple[float, str, bool]]:
    """Return the values between tags, `<node>value</node>`; a value may contain `<`."""
    name = node.id.lower()
    values = {normalize(value): value for value in node.values}
    parts = [part.partition(f"</{name}>") for part in text.split(f"<{name}>")[1:]]
    written = [word.strip() for word, end, _ in parts if end]
    return [(0.0, values[word], False) for word in written if word in values]


def _candidates(node: RuleNode, text: str) -> list[tuple[float, str, bool]]:
    """Return priority, value and uncertainty of every match that counts."""
    # Looking for plain texts first is several times faster than the patterns, few of which match.
    found_spans = (
        (rule, match.span())
        for rule, needed in node.finders
        if not needed or any(part in text for part in needed)
        for pattern in rule.patterns
        for match in pattern.finditer(text)
    )
    matches = list(islice(found_spans, MAX_MATCHES))
    if not matches:
        return []
    context = _context(node, text, [span for _, span in matches])
    found: list[tuple[float, str, bool]] = []
    for rule, span in matches:
        value, priority = _value(rule, context, span)
        if value is not None:
            found.append((priority, value, context.is_hedged(span)))
    return found


def _context(node: RuleNode, text: str, spans: list[Span]) -> ClauseContext:
    return ClauseContext(text, read_cues(node.language), sorted(begin for begin, _ in spans))


def _value(rule: ExtractRule, context: ClauseContext, span: Span) -> tuple[str | None, float]:
    """Return the value of a match, None if it does not count, and its priority."""
    negated = rule.negatable and context.is_negated(span)
    if rule.only_negated:
        return (rule.value if negated else None), rule.priority - NEGATED_PRIORITY
    if negated:
        return rule.negated, rule.priority - NEGATED_PRIORITY
    return rule.value, rule.priority
