"""LLaVA-Rad's annotation files of MIMIC-CXR: which rows count, and the question they get (llava-rad.md 3.3 and 3.4).

    chat_{train,dev,test}_MIMIC_CXR_all_gpt4extract_rulebased_v1.json --rule of the loader--> question, or a cause

The files hold bare NaN, repeat ids (several pictures of a study, two extractions of one report), and name pictures from
`mimic/` on. A reason, a view or a text that is null, NaN or blank is simply not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.data.converters.base import Job
from llava.data.converters.dataset_cards import ANNOTATIONS
from llava.data.converters.items import Event, Excluded, Item
from llava.data.converters.tables import Row, cell, read_table
from llava.data.quarantine import BadRow
from llava.data.readers.report_prompts import FRONTAL, first_text, question
from llava.errors import DataError
from llava.samples import Origin
from llava.utils.lookup import lookup

FILES = {
    split: f"chat_{word}_MIMIC_CXR_all_gpt4extract_rulebased_v1.json"
    for split, word in {"train": "train", "val": "dev", "test": "test"}.items()
}
RULE_BASED = "rule-based"
PREFIX = "mimic/"
VIEW_QUESTION = "Given the chest X-ray image from {view} view, describe the findings in the image: "


class LeftOut(Exception):
    """A rule leaves a row out; the message is the cause that is counted."""


Rule = Callable[[Row, str], str]
"""Row and split to the question; raises `LeftOut`."""


def findings_of(row: Row) -> str:
    """Return the findings: what the answer of the conversation says.

    Raises:
        LeftOut: there are none.
    """
    text = _turn(row, "gpt")
    if not isinstance(text, str):
        raise LeftOut("no findings")
    return text


def by_reason(row: Row, split: str) -> str:
    """Frontal views, asked with the reason; of the test part only the sections taken by rules."""
    _frontal_only(row)
    if split == "test" and row.get("generate_method") != RULE_BASED:
        raise LeftOut("test row not extracted by rules")
    return question("findings", first_text([row.get("reason")]))


def as_written(row: Row, split: str) -> str:
    """Frontal views with the question of the file."""
    _frontal_only(row)
    return str(_turn(row, "human") or "").replace(IMAGE_TOKEN, "").strip()


def by_view(row: Row, split: str) -> str:
    """All views; the question names the view."""
    view = row.get("view")
    return VIEW_QUESTION.format(view=view if isinstance(view, str) else "Unknown")


LOADERS: dict[str, Rule] = {
    "mimic_findings": by_reason,
    "mimic_cxr_all_frontal_findings": as_written,
    "mimic_cxr_all_views_findings": by_view,
}
"""`mimic_findings` is `mimic_train_findings` on the training file and `mimic_test_findings` on the test file."""


def read_annotations(job: Job) -> Iterator[Event]:
    """Yield the rows of the annotation files that are there.

    Raises:
        DataError: none is.
    """
    rule = lookup(LOADERS, job.args.loader, "loader")
    found = {split: job.sources.file(name) for split, name in FILES.items()}
    if not any(found.values()):
        raise DataError(f"{job.missing(FILES['train'])}\n{ANNOTATIONS.how_to_get}")
    for split, path in found.items():
        if path is None:
            continue
        job.inputs[path.name] = path
        for origin, row in read_table(path, columns=("id", "image", "conversations")):
            if job.is_full(split):
                break
            yield _event(job, rule, origin, row, split)


def _event(job: Job, rule: Rule, origin: Origin, row: Row | DataError, split: str) -> Event:
    if isinstance(row, DataError):
        return BadRow(*origin, "", str(row))
    try:
        answer = findings_of(row)
        asked = rule(row, split)
    except LeftOut as cause:
        return Excluded(split, str(cause))
    name = str(row["image"]).removeprefix(PREFIX)
    method = first_text([row.get("generate_method")])
    identity = f"{row['id']}_{Path(name).stem}" + ("" if method in ("", RULE_BASED) else f"_{method}")
    try:
        image = job.sources.image(name, "files")
    except DataError as error:
        return BadRow(*origin, identity, str(error))
    patient, _, study = str(row["id"]).partition("_")
    meta = {
        "answer_type": "OPEN",
        "question_type": "findings",
        "image_organ": "CHEST",
        "modality": "X-ray",
        "official_split": split,
        "view": first_text([row.get("view")]),
        "orientation": first_text([row.get("orientation")]),
        "patient": patient,
        "study": study,
        "generate_method": method,
        "reason": first_text([row.get("reason")]),
        "chexpert_labels": _labels(row),
        "source": ANNOTATIONS.name,
        "license": ANNOTATIONS.license,
    }
    return Item(identity, split, asked, answer.strip(), image, name, meta, origin)


def _turn(row: Row, speaker: str) -> Any:
    """Return the first value of a speaker, whatever it is; None where there is none."""
    turns = row.get("conversations")
    turns = turns if isinstance(turns, list) else []
    return next((turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == speaker), None)


def _frontal_only(row: Row) -> None:
    if cell(row, "view") not in FRONTAL:
        raise LeftOut("not a frontal view (AP or PA)")


def _labels(row: Row) -> dict[str, float]:
    labels = row.get("chexpert_labels")
    numbers = labels.items() if isinstance(labels, dict) else ()
    return {name: value for name, value in numbers if isinstance(value, int | float) and math.isfinite(value)}
