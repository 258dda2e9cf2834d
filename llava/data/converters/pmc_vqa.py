"""Converter for PMC-VQA, both releases: multiple-choice questions about figures of articles.

    release 1: train.csv, test.csv: Figure_path, Question, Answer, Choice A..D, Answer_label        + images.zip
    release 2: train_2.csv, test_2.csv: index, Figure_path, Caption, Question, Choice A..D, Answer (a letter), split
                                                                                                     + images_2.zip

By default the answer is the text of the correct choice (an open question). With --choices the question lists the four
choices and the answer is the letter and text of one of them (a closed question).

Command:
    llava data pmc-vqa DOWNLOADED images_2.zip --out data/pmc-vqa --release 2
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from llava.data.converters.base import Converter, Job, run_converter
from llava.data.converters.dataset_cards import PMC_VQA
from llava.data.converters.items import ConvertedItem, Event
from llava.data.converters.tables import Row, answer_cell, cell_text, read_table
from llava.data.quarantine import BadRow
from llava.errors import ConfigError, DataError
from llava.samples import Origin
from llava.utils.cli import Parser

PREFIX = "release "
CLEAN = ("test_clean.csv",)
LETTERS = ("A", "B", "C", "D")
FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "1": {"train": ("train.csv",), "test": ("test.csv",)},
    "2": {"train": ("train_2.csv", "train2.csv"), "test": ("test_2.csv", "test2.csv")},
}
IMAGE_FOLDERS = {"1": ("images",), "2": ("images_2/figures", "images_2", "images2", "figures", "images")}
NEEDED = ("Figure_path", "Question", "Answer", *(f"Choice {letter}" for letter in LETTERS))


def read_events(job: Job) -> Iterator[Event]:
    """Yield the questions of the release that exists."""
    release = _release(job)
    job.variant = f"{PREFIX}{release}"
    for split, names in FILES[release].items():
        path = job.require_file(*(CLEAN if split == "test" and job.args.clean else names))
        for origin, row in read_table(path, columns=NEEDED):
            if job.is_full(split):
                break
            yield _event(job, origin, row, split)


def _release(job: Job) -> str:
    """Return the release to read.

    Raises:
        DataError: neither release exists.
        ConfigError: both exist and --release is missing, or --clean is used with release 2.
    """
    found = [release for release, files in FILES.items() if job.sources.file(*files["train"])]
    chosen = str(job.args.release) if job.args.release else found[0] if len(found) == 1 else ""
    if not found:
        raise DataError(job.missing("train.csv or train_2.csv"))
    if not chosen:
        raise ConfigError("both releases are present; choose one with --release 1 or --release 2")
    if job.args.clean and chosen == "2":
        raise ConfigError("--clean reads test_clean.csv of release 1, but the release is 2")
    return chosen


def _event(job: Job, origin: Origin, row: Row | DataError, split: str) -> Event:
    release = job.variant.removeprefix(PREFIX)
    identity = f"pmcvqa{release}_{split}_{origin.row}"
    if isinstance(row, DataError):
        return BadRow(*origin, identity, str(row))
    name = cell_text(row, "Figure_path")
    try:
        choices = {letter: _choice(answer_cell(row, f"Choice {letter}"), letter) for letter in LETTERS}
        letter = _letter(row, choices)
        image = job.sources.image(name, *IMAGE_FOLDERS[release])
    except DataError as error:
        return BadRow(*origin, identity, str(error))
    question = cell_text(row, "Question")
    if job.args.choices:
        question += "".join(f"\n{name}: {text}" for name, text in choices.items())
    meta = {
        "answer_type": "CLOSED" if job.args.choices else "OPEN",
        "question_type": "multiple choice" if job.args.choices else "",
        "official_split": split,
        "source": job.card.name,
        "license": job.card.license,
        "choices": list(choices.values()),
        "answer_label": letter,
        "caption": cell_text(row, "Caption") if job.args.captions else "",
    }
    answer = f"{letter}: {choices[letter]}" if job.args.choices else choices[letter]
    return ConvertedItem(identity, split, question, answer, image, name, meta, origin)


def _choice(text: str, letter: str) -> str:
    """Return a choice without its letter prefix, which has several forms, such as ` A:Focal uptake`."""
    return re.sub(rf"^\s*{letter}\s*[:.)]\s*", "", text, flags=re.IGNORECASE).strip()


def _letter(row: Row, choices: dict[str, str]) -> str:
    """Return the letter of the correct choice.

    Raises:
        DataError: the row marks no choice, or that choice is empty.
    """
    answer = answer_cell(row, "Answer")
    label = (cell_text(row, "Answer_label") or (answer if answer.upper() in LETTERS else "")).upper()
    if label not in LETTERS:
        wanted = {_choice(answer, letter).lower() for letter in LETTERS}
        label = next((letter for letter, text in choices.items() if text and text.lower() in wanted), "")
    if not label or not choices[label]:
        raise DataError("no choice is marked as the answer; expected a letter A to D in 'Answer_label' or 'Answer'")
    return label


def add_options(parser: Parser) -> None:
    """Add the options of this converter."""
    parser.add_argument("--release", type=int, choices=(1, 2), help="release to read, if both are present")
    parser.add_switch("--choices", help="list the four choices in the question; the answer is one of them")
    parser.add_switch("--clean", help="release 1: read test_clean.csv (manually verified) instead of test.csv")
    parser.add_switch("--captions", help="release 2: keep the figure's caption in the field `caption`")


CONVERTER = Converter("pmc-vqa", PMC_VQA, read_events, add_options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data pmc-vqa`."""
    run_converter(CONVERTER, argv)
