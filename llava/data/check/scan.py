"""One pass over the rows of a file: what is wrong in each, and what is remembered to compare them.

stream_rows --view_row--> problems -> Findings,  digests -> Ledger,  classes -> Balance
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.check.balance import Balance
from llava.data.check.findings import Findings
from llava.data.check.identifiers import identifier_rules
from llava.data.check.row_index import Ledger, field_key
from llava.data.check.rows import RowView, view_row
from llava.data.check.stream import stream_rows
from llava.utils.log import progress

_NO_TEXT = frozenset({"id", "questionid", "image", "conversations", "conversatons", "url", "doi", "pairid", "pmid"})
"""Fields that are no text, or are looked at elsewhere, or are public by nature."""


@dataclass(slots=True)
class Scan:
    """What one pass over a file found besides findings.

    Attributes:
        path: the file.
        ledger: its rows, as numbers.
        balance: its classes.
        repairs: rows by what the reader put right in them.
        num_questions: rows of question files, which need no answer.
        num_readable: rows that are samples.
    """

    path: Path
    ledger: Ledger
    balance: Balance = field(default_factory=Balance)
    repairs: Counter[str] = field(default_factory=Counter)
    num_questions: int = 0
    num_readable: int = 0


def scan_file(path: Path, ledger: Ledger, file: int, findings: Findings) -> Scan:
    """Read every row of a file once.

    Raises:
        DataError: there is no such file.
    """
    scan = Scan(path, ledger)
    for row, value in progress(stream_rows(path), title=f"rows of {path.name}", unit="row"):
        seen = view_row(value, row)
        for problem in seen.problems:
            findings.add(problem.rule, file, [row], problem.message)
        ledger.add(row, seen)
        scan.repairs.update(seen.repairs)
        scan.num_readable += seen.sample is not None
        scan.num_questions += seen.is_question
        if isinstance(value, dict):
            ledger.add_groups(row, value)
            scan.balance.add(value, seen.sample)
            for rule in identifier_rules(_texts(value, seen, ledger)):
                findings.add(rule, file, [row])
    return scan


def _texts(value: Mapping[str, Any], seen: RowView, ledger: Ledger) -> Iterator[str]:
    """Yield the texts of a row: its turns, and other fields that hold text; ids of patients and studies are not."""
    if seen.sample is not None:
        for turn in seen.sample.conversation.turns:
            yield turn.text
    for name, part in value.items():
        if field_key(name) in _NO_TEXT or field_key(name) in ledger.groups:
            continue
        for text in part if isinstance(part, list) else [part]:
            if isinstance(text, str):
                yield text
