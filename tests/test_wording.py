"""Vocabulary of the package and its documents, as `CONTRIBUTING.md` lists it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FORBIDDEN = {
    "American spelling": r"optimis|behaviour|colour|grey|licence|[a-z]{3}alis(e|ed|es|ing|ation)\b|neighbour|centre|favour"
    r"|labelled|recognis|summaris|initialis|tokenis|minimis",
    "image": r"picture|(?<![a-z])films?(?![a-z])",
    "placeholder": r"place[ _-]holder",
    "plain English": r"\banew\b|\bbesides\b|\bgoes on\b|\bin the place of\b|\blikewise\b|\bmend(s|ed|ing)?\b|\bnobody\b"
    r"|\bso many\b|\bthere is no\b|\btold\b|\bwhoever\b",
}
"""Patterns by what to write instead; they are searched in lower case, in code, comments, docstrings and messages."""

PUBLISHED: dict[str, tuple[str, ...]] = {}
"""Text that keeps its spelling, by file: names of others, and keys of files that older versions wrote."""


def documents() -> list[Path]:
    """Every source file and document that the rules hold for."""
    found = [*(ROOT / "llava").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    return sorted(found)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words(path: Path) -> None:
    text = path.read_text(encoding="utf-8").lower()
    for published in PUBLISHED.get(path.relative_to(ROOT).as_posix(), ()):
        assert published in text, f"{published!r} is listed and not there"
        text = text.replace(published, "")
    lines = text.splitlines()
    found = [
        f"line {number}: {match.group()!r}, see {rule!r}"
        for number, line in enumerate(lines, 1)
        for rule, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, line)
    ]
    assert not found, "\n".join(found)
