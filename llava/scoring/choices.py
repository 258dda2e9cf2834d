"""Closed answers by strict rules: yes and no, options by letter or text, and other texts by equality."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava.scoring.decisions import DECISIONS, first_decision, unified_text
from llava.scoring.strict import same_words, strict_pair, strict_words

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARK = "\ue000"
"""Word that stands for the mark behind a single letter (`B.`, `(B)`, `B:`)."""

_LETTER_AND_MARK = re.compile(r"(?<![\w'-])([a-zA-Z])(?=\s*(?:[.:),;\]](?:[\s*]|$)|\n)|\.[^\W\d_]{2})")
_MARKUP = re.compile(r"\\(?:boxed|text[a-z]*|math[a-z]+)(?=\W)|\$")
# Words before and after a letter that names an option, as in `the answer is B because ...`.
_BEFORE = frozenset(
    ("answer", "option", "choice", "letter", "label", "is", "be", "it's", "select", "choose", "pick", "say", "think")
) | frozenset(("correct", "and", "or"))
_AFTER = frozenset(("and", "or", "nor", "but", "is", "was", "as", "because", "since"))
_NEGATIONS = frozenset(("not", "no", "nor", "neither", "never", "except", "without", "cannot"))


def choices_of(meta: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return options and correct letter from the fields of a multiple-choice row; both empty otherwise.

    The fields are `choices` (a list of texts) and `answer_label` (a letter), as `llava data pmc-vqa --choices` writes
    them. Fields of another form are ignored.
    """
    choices, label = meta.get("choices"), str(meta.get("answer_label", "")).strip().lower()
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        return (), ""
    known = len(label) == 1 and label in LETTERS[: len(choices)] and 2 <= len(choices) <= len(LETTERS)
    return (tuple(choices), label) if known else ((), "")


def is_closed_hit(reference: str, prediction: str, *, choices: Sequence[str] = (), label: str = "") -> bool:
    """Return whether the answer to a closed question is right; an empty one never is.

    >>> is_closed_hit("yes", "Yes, there is.")
    True
    >>> is_closed_hit("liver", "The answer is B.", choices=("lung", "liver"), label="B")
    True

    Args:
        reference: the right answer.
        prediction: the answer as written.
        choices: texts of the options of a multiple-choice question; empty for other questions.
        label: letter of the right option.
    """
    if choices:
        return named_options(prediction, choices) == named_options(label, choices)
    right, said = strict_pair(reference, prediction)
    if right in ([word] for word in DECISIONS):
        return first_decision(prediction) == right[0]
    return same_words(right, said)


def named_options(answer: str, choices: Sequence[str]) -> frozenset[int]:
    """Return the indices of the options that an answer names; of options with equal texts, the first.

    `B`, `(b)`, `B.`, `liver`, `The liver.`, `B: liver`, `liver (B)` and `The answer is B` name one option; `A or B`,
    `B: lung` (where lung is A) and `lung and liver` name two. A negated answer (`not B`) names none.

    Args:
        answer: the answer as written.
        choices: texts of the options, in the order of their letters; at most 26.
    """
    texts = [_words(choice) for choice in choices]
    words = _words(answer)
    whole = _option_of([word for word in words if word != MARK], texts)
    if whole is not None:
        return frozenset({whole})
    found, rest = _named_by_text(words, texts)
    if any(word in _NEGATIONS or word.endswith("n't") for word in rest):
        return frozenset()
    found |= {texts.index(texts[place]) for place in _named_by_letter(rest, len(choices))}
    return frozenset(found)


def _words(text: str) -> list[str]:
    return strict_words(_LETTER_AND_MARK.sub(rf"\1 {MARK} ", _MARKUP.sub(" ", unified_text(text))))


def _option_of(words: list[str], texts: Sequence[list[str]]) -> int | None:
    """Return the option of an answer that is nothing else than its letter, its text, or both."""
    plain = [[word for word in text if word != MARK] for text in texts]
    for letter, text in zip(LETTERS, plain, strict=False):
        if words == [letter] or (text and words in ([letter, *text], [*text, letter])):
            return plain.index(text) if text else LETTERS.index(letter)
    return plain.index(words) if words and words in plain else None


def _named_by_text(words: list[str], texts: Sequence[list[str]]) -> tuple[set[int], list[str]]:
    """Return the options whose text is part of an answer, longest first, and the words with those marked."""
    found: set[int] = set()
    for text in sorted(filter(None, texts), key=len, reverse=True):
        size = len(text)
        rest: list[str] = []
        place = 0
        while place < len(words):
            if words[place : place + size] == text:
                found.add(texts.index(text))
                rest.append(MARK)
                place += size
            else:
                rest.append(words[place])
                place += 1
        words = rest
    return found, words


def _named_by_letter(words: list[str], num_options: int) -> set[int]:
    """Return the options whose letter stands alone, as in `B.`, `B because ...` and `the answer is B`."""
    letters = LETTERS[:num_options]
    found = set()
    for place, word in enumerate(words):
        if len(word) != 1 or word not in letters:
            continue
        before, after = words[place - 1] if place else MARK, words[place + 1] if place + 1 < len(words) else MARK
        if (before == MARK or before in _BEFORE or before in letters) and (
            after == MARK or after in _AFTER or after in letters
        ):
            found.add(letters.index(word))
    return found
