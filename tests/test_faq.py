"""Texts that docs/FAQ.md quotes are messages of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GAP = "…"


def text_of(node: ast.AST) -> str | None:
    """Return a text in the code, with `GAP` for each value that is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    return None


def messages() -> list[str]:
    found = []
    for path in sorted((ROOT / "llava").rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found += [" ".join(text.split()) for node in nodes if (text := text_of(node)) is not None]
    return found


def quoted() -> list[str]:
    text = (ROOT / "docs" / "FAQ.md").read_text(encoding="utf-8")
    bold = re.findall(r"^\*\*`(.+?)`\*\*", text, re.MULTILINE | re.DOTALL)
    return [" ".join(quote.split()) for quote in bold]


def is_message(quote: str, known: list[str]) -> bool:
    """Return whether the parts of a quote between gaps follow each other in one text of the code."""
    parts = [part for part in quote.split(GAP) if part.strip(" .:;,")]
    pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
    return bool(parts) and any(pattern.search(text) for text in known)


def test_every_quoted_message_is_in_the_code() -> None:
    known = messages()
    found = quoted()
    assert len(found) > 25
    assert [quote for quote in found if not is_message(quote, known)] == []


def test_a_changed_message_is_noticed() -> None:
    assert not is_message("set --max-steps to a streaming mixture", messages())
    assert is_message(f"tower features of {GAP} images need {GAP} GB", messages())
