"""Single pass over the rows of a file that collects problems, digests and class counts.

iter_rows --view_row--> problems -> CheckFindings,  digests -> RowIndex,  classes -> ClassBalance
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.check.lengths import TextLengths
from llava.data.check.pairs import LabelLengths, PairLengths
from llava.data.check.row_index import RowIndex
from llava.data.check.rows import CheckedRow, view_row
from llava.data.check.rules import FILE, NOT_TRAINABLE, RULES, CheckFindings
from llava.data.check.vocabulary import LONG, MAX_CHARACTERS, OTHER, shown_counts
from llava.data.groups import field_key
from llava.data.identifiers import identifier_rules
from llava.errors import DataError
from llava.samples import Sample
from llava.scoring.decisions import first_decision, is_closed
from llava.utils.json_rows import iter_rows
from llava.utils.log import with_progress

CLASS_FIELDS = (
    "answer_type",
    "question_type",
    "content_type",
    "image_organ",
    "organ",
    "location",
    "modality",
    "domain",
    "view",
    "label",
    "disease",
    "source",
    "license",
    "official_split",
)
"""Fields with the class of a row."""

MAX_CLASSES = 200
"""Classes counted per field."""


class ClassBalance:
    """Counts of rows by class; its size does not depend on the number of rows.

    Attributes:
        counts: rows by class, by field.
        turns: rows by number of questions.
        images: rows by number of images.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.turns: Counter[int] = Counter()
        self.images: Counter[int] = Counter()

    def add(self, value: Mapping[str, Any], sample: Sample | None) -> None:
        """Count one row: its fields and, if it can be read, its conversation."""
        for name in CLASS_FIELDS:
            for word in dict.fromkeys(_classes(value.get(name))):  # each once per row
                self._count(name, word)
        if sample is None:
            return
        turns = sample.conversation.turns
        self.turns[sum(turn.role == "human" for turn in turns)] += 1
        self.images[len(sample.images)] += 1
        answer = next((turn.text for turn in turns if turn.role == "gpt"), None)
        if answer is not None and len(turns) == 2 and _closed(sample, answer):
            self._count("closed answers", first_decision(answer) or "neither yes nor no")

    def _count(self, name: str, word: str) -> None:
        counter = self.counts.setdefault(name, Counter())
        if word not in counter and (len(counter) >= MAX_CLASSES or identifier_rules([word])):
            word = OTHER
        counter[word] += 1

    def tables(self) -> dict[str, dict[str, int]]:
        """Return the counts by field and class, the most frequent first; rare and unknown classes as one."""
        return {name: shown_counts(name, counter) for name, counter in self.counts.items()}


def _closed(sample: Sample, answer: str) -> bool:
    try:
        return is_closed(sample.meta.get("answer_type"), answer)
    except DataError:
        return False


def _classes(value: Any) -> list[str]:
    """Return the classes in a field: a word, a list of words, or the true keys of an object."""
    if isinstance(value, Mapping):
        return [_short(name) for name, flag in value.items() if flag is True]
    if isinstance(value, list):
        return [_short(part) for part in value if isinstance(part, str | int)]
    return [_short(value)] if isinstance(value, str | int) and str(value).strip() else []


def _short(value: Any) -> str:
    word = str(value).strip()
    return word if len(word) <= MAX_CHARACTERS else LONG


_NO_TEXT = frozenset({"id", "questionid", "image", "conversations", "conversatons", "url", "doi", "pairid", "pmid"})
"""Fields that are not searched for identifiers: not text, checked elsewhere, or public."""


@dataclass(slots=True)
class FileScan:
    """Result of the scan of one file, except its findings.

    Attributes:
        path: the file.
        index: digests of its rows.
        balance: counts of its classes.
        repairs: number of rows by deviation from the format that was accepted.
        num_questions: number of rows of a question file, which need no answer.
        num_readable: number of rows that are samples.
        num_trainable: number of rows that training would read and learn from.
        lengths: lengths of the answers of preference pairs.
        labels: lengths of single answers with a label.
        texts: words of questions and answers.
    """

    path: Path
    index: RowIndex
    balance: ClassBalance = field(default_factory=ClassBalance)
    repairs: Counter[str] = field(default_factory=Counter)
    num_questions: int = 0
    num_readable: int = 0
    num_trainable: int = 0
    lengths: PairLengths = field(default_factory=PairLengths)
    labels: LabelLengths = field(default_factory=LabelLengths)
    texts: TextLengths = field(default_factory=TextLengths)


def scan_file(path: Path, index: RowIndex, file: int, findings: CheckFindings) -> FileScan:
    """Scan all rows of a file.

    Raises:
        DataError: the file cannot be opened.
    """
    scan = FileScan(path, index)
    for row, value in with_progress(iter_rows(path), title=f"rows of {path.name}", unit="row"):
        seen = view_row(value, row)
        for problem in seen.problems:
            findings.add(problem.rule, file, [row], problem.message)
        index.add(row, seen)
        scan.repairs.update(seen.repairs)
        scan.num_readable += seen.sample is not None
        scan.num_questions += seen.is_question
        if seen.sample is not None:
            scan.texts.add(seen.sample.conversation)
        if seen.pair is not None:
            scan.lengths.add(seen.pair)
        if seen.is_good is not None and seen.sample is not None:
            scan.labels.add(seen.sample.conversation, is_good=seen.is_good)
        scan.num_trainable += seen.sample is not None and not any(
            RULES[problem.rule].level == "error" or problem.rule in NOT_TRAINABLE for problem in seen.problems
        )
        if isinstance(value, dict):
            index.add_groups(row, value)
            scan.balance.add(value, seen.sample)
            for rule in identifier_rules(_texts(value, seen, index)):
                findings.add(rule, file, [row])
    if not index.num_rows:
        findings.add("no-rows", file, [])
    num_empty = findings.of("only-empty-answers", file).count
    if file == FILE and num_empty and not scan.num_trainable and not findings.rules("error"):
        findings.add("nothing-trained", file, [0])
    return scan


def _texts(value: Mapping[str, Any], seen: CheckedRow, index: RowIndex) -> Iterator[str]:
    """Yield the texts of a row: its turns and its text fields, except ids of patients and studies."""
    for side in seen.sides():
        for turn in side.conversation.turns:
            yield turn.text
    for name, part in value.items():
        if field_key(name) in _NO_TEXT or field_key(name) in index.groups:
            continue
        for text in part if isinstance(part, list) else [part]:
            if isinstance(text, str):
                yield text
