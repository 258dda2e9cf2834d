"""What is asked about a SYNTHETIC drawing, and a data folder in LLaVA format made of many of them.

    DIR/images/*.png   DIR/captions.json (alignment)   DIR/train.json   DIR/test.json (about other drawings)

Within each file and type of question every answer occurs equally often, so a model that does not look at the picture,
and one that always gives the commonest answer, score what guessing scores.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL.PngImagePlugin import PngInfo

from llava.constants import IMAGE_TOKEN
from llava.quickstart.drawing import Smear, corner_of, draw, sample_smear
from llava.utils import log
from llava.utils.jsonl import write_json

NOTICE = "SYNTHETIC drawing made by a program; not a photograph, no medical content"
"""Written into every picture's metadata and every row's field `source`, and shown beside every picture."""

NUMBERS = ("zero", "one", "two", "three")
BLOCK = 1_000_000
"""Distance between the seeds of two data sets: no drawing of one is in another."""


class Question(NamedTuple):
    """A type of question: its wordings, whether it is answered by yes or no, and its answer (None: not asked)."""

    name: str
    kind: Literal["OPEN", "CLOSED"]
    wordings: tuple[str, ...]
    answer: Callable[[Smear], str | None]


def _yes(condition: object) -> str:
    return "yes" if condition else "no"


QUESTIONS = (
    Question(
        "white_presence",
        "CLOSED",
        ("Is a white blood cell visible?", "Is there any white blood cell in the picture?"),
        lambda smear: _yes(smear.white),
    ),
    Question(
        "platelet_presence",
        "CLOSED",
        ("Are platelets visible?", "Does the picture show platelets?"),
        lambda smear: _yes(smear.platelets),
    ),
    Question(
        "parasite_presence",
        "CLOSED",
        ("Do any red cells hold a parasite?", "Is a parasite visible?"),
        lambda smear: _yes(smear.parasites),
    ),
    Question(
        "white_count",
        "OPEN",
        ("How many white blood cells are there?", "What is the number of white blood cells?"),
        lambda smear: NUMBERS[len(smear.white)],
    ),
    Question(
        "white_type",
        "OPEN",
        ("What type of white blood cell is shown?", "Which white blood cell is this?"),
        lambda smear: smear.white[0].kind if smear.white else None,
    ),
    Question(
        "white_place",
        "OPEN",
        ("Where is the white blood cell?", "In which quarter is the white blood cell?"),
        lambda smear: corner_of(smear.white[0]) if len(smear.white) == 1 else None,
    ),
    Question(
        "stain",
        "OPEN",
        ("What is the colour of the background?", "Which colour has the background?"),
        lambda smear: smear.stain,
    ),
    Question(
        "density",
        "OPEN",
        ("How dense are the red cells?", "What is the density of the red cells?"),
        lambda smear: smear.density,
    ),
)


def caption(smear: Smear) -> str:
    """Return a short description that holds every fact the questions ask about."""
    if smear.white:
        kind, number = smear.white[0].kind, len(smear.white)
        place = f" in the {corner_of(smear.white[0])}" if number == 1 else ""
        white = f"{NUMBERS[number]} {kind}{'s' if number > 1 else ''}{place}"
    else:
        white = "no white blood cell"
    platelets = "platelets" if smear.platelets else "no platelets"
    parasites = "parasites" if smear.parasites else "no parasites"
    return f"Synthetic smear, {smear.stain} background, {smear.density} red cells, {white}, {platelets}, {parasites}."


def balanced(rows: Iterable[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Keep equally many rows of every answer within each type of question; the order of the rows stays."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    all_rows = list(rows)
    for index, row in enumerate(all_rows):
        groups[row["question_type"]][row["conversations"][1]["value"]].append(index)
    kept: set[int] = set()
    for answers in groups.values():
        fewest = min(map(len, answers.values()))
        for indices in answers.values():
            kept.update(rng.sample(indices, fewest))
    return [row for index, row in enumerate(all_rows) if index in kept]


def question_rows(smear: Smear, image: str, rng: random.Random) -> list[dict[str, Any]]:
    """Return one row for every question that can be asked of this drawing, one wording each."""
    rows = []
    for question in QUESTIONS:
        answer = question.answer(smear)
        if answer is not None:
            identity = f"{Path(image).stem}-{question.name}"
            row = _row(identity, image, f"{IMAGE_TOKEN}\n{rng.choice(question.wordings)}", answer)
            rows.append({**row, "answer_type": question.kind, "question_type": question.name})
    return rows


def pick(rows: Iterable[dict[str, Any]], count: int, *, seed: int) -> list[dict[str, Any]]:
    """Return some questions about as many different images as there are, in their order.

    Args:
        rows: questions in LLaVA format.
        count: how many to keep; all, when there are fewer.
        seed: of the choice.
    """
    all_rows = list(rows)
    rng = random.Random(seed)
    by_image: dict[str, list[int]] = defaultdict(list)
    for index in rng.sample(range(len(all_rows)), len(all_rows)):
        by_image[str(all_rows[index].get("image"))].append(index)
    rounds = zip_longest(*by_image.values())
    order = [index for turn in rounds for index in turn if index is not None]
    return [all_rows[index] for index in sorted(order[:count])]


def _row(identity: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": image, "conversations": turns, "source": NOTICE}


def write_dataset(folder: Path, *, num_train: int, num_test: int, seed: int) -> None:
    """Draw the pictures and write the three record files into `folder`.

    The record files are written last, each under a temporary name first: when `test.json` exists, all is there.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    captions: list[dict[str, Any]] = []
    questions: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    plan = [("train", index) for index in range(num_train)] + [("test", index) for index in range(num_test)]
    for number, (split, index) in enumerate(log.progress(plan, title="drawing", unit="picture")):
        smear = sample_smear(seed * BLOCK + number)
        image = f"synthetic-{split}-{index:04d}.png"
        notice = PngInfo()
        notice.add_text("Comment", NOTICE)
        draw(smear).save(folder / "images" / image, pnginfo=notice)
        questions[split] += question_rows(smear, image, rng)
        if split == "train":
            wording = f"{IMAGE_TOKEN}\nDescribe the picture."
            captions.append(_row(f"{Path(image).stem}-caption", image, wording, caption(smear)))
    write_json(folder / "captions.json", captions)
    write_json(folder / "train.json", balanced(questions["train"], rng))
    write_json(folder / "test.json", balanced(questions["test"], rng))
