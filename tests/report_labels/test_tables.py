"""Tables of the labeler: common entries are common in real reports, rare ones have a reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType

import pytest

from llava.report_labels import cues, mentions
from llava.report_labels.entries import Entry, Finder
from tests.support.iu_reports import iu_findings

MIN_USES = 3


def tables(module: ModuleType) -> Iterator[tuple[str, Entry]]:
    """Yield every entry of the tables of a module with the name of its table."""
    for name, value in vars(module).items():
        for part in value.values() if isinstance(value, dict) else [value]:
            table = part.table if isinstance(part, Finder) else part
            if isinstance(table, tuple):
                yield from ((name, entry) for entry in table if isinstance(entry, Entry))


ENTRIES = sorted({*tables(mentions), *tables(cues)}, key=lambda pair: (pair[0], pair[1].pattern))


def test_rare_entries_have_a_reason() -> None:
    texts = [text.lower() for text in iu_findings().values()]
    rare = []
    for name, entry in ENTRIES:
        pattern = re.compile(entry.regex())
        uses = 0
        for text in texts:
            uses += pattern.search(text) is not None
            if uses == MIN_USES or entry.why:
                break
        if uses < MIN_USES and not entry.why:
            rare.append((name, entry.pattern))
    assert rare == []


@pytest.mark.parametrize(("name", "entry"), ENTRIES, ids=lambda value: value if isinstance(value, str) else "")
def test_no_entry_matches_a_whole_sentence(name: str, entry: Entry) -> None:
    pattern = re.compile(entry.regex())
    sentences = (
        "there is no focal consolidation, pleural effusion, or pneumothorax",
        "the heart is normal in size and contour",
        "the cardiomediastinal silhouette is within normal limits",
        "the lungs are clear bilaterally without focal airspace disease",
    )
    assert not any(pattern.fullmatch(sentence) for sentence in sentences)


def test_stems_do_not_hide_a_match() -> None:
    texts = list(iu_findings().values())[::5]
    for module in (mentions, cues):
        for value in vars(module).values():
            for finder in value.values() if isinstance(value, dict) else [value]:
                if isinstance(finder, Finder):
                    for text in texts:
                        lower = text.lower()
                        assert finder.spans(lower) == [match.span() for match in finder.pattern.finditer(lower)]
