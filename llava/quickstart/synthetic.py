"""What is asked about a SYNTHETIC drawing, and a data folder in LLaVA format made of many of them.

    DIR/images/*.png   DIR/captions.json (alignment)   DIR/train.json   DIR/test.json (about other drawings)

Within each file and type of question every answer occurs equally often, so a model that does not look at the picture,
and one that always gives the commonest answer, score what guessing scores.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from llava.constants import IMAGE_TOKEN
from llava.utils import log
from llava.utils.jsonl import write_json

SIDE = 224
"""Side of a picture in pixels."""

OVERSAMPLING = 2
"""Drawn this much larger, then reduced: smooth edges."""

Colour = tuple[int, int, int]

STAINS: dict[str, tuple[Colour, Colour]] = {
    "pink": ((246, 214, 222), (222, 128, 140)),
    "blue": ((206, 220, 242), (190, 122, 150)),
    "yellow": ((246, 238, 200), (216, 136, 116)),
}
"""Colour of the background and of the red cells, by name of the stain."""

WHITE_CELLS: dict[str, tuple[Colour, Colour]] = {
    "neutrophil": ((226, 206, 232), (92, 40, 140)),
    "lymphocyte": ((150, 180, 232), (62, 34, 128)),
    "eosinophil": ((246, 170, 120), (112, 44, 130)),
}
"""Colour of the cell body and of the nucleus, by type."""

DENSITIES = {"sparse": (4, 7), "moderate": (12, 16), "crowded": (24, 30)}
"""Fewest and most red cells, by name of the density."""

NUM_WHITE_WEIGHTS = (0.40, 0.32, 0.14, 0.14)
"""Chance of 0, 1, 2, 3 white cells."""

RED_RADIUS, WHITE_RADIUS, PLATELET_RADIUS = 12.0, 27.0, 5.0
PLATELET_COLOUR: Colour = (120, 60, 160)
PARASITE_COLOUR: Colour = (50, 10, 90)
CORNERS = ("upper left", "upper right", "lower left", "lower right")


class Cell(NamedTuple):
    """A cell of some kind; centre in pixels of the picture, y downwards."""

    kind: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Smear:
    """The truth of one drawing; `seed` fixes the small details of the picture (outlines, lobes)."""

    seed: int
    stain: str
    density: str
    red: tuple[Cell, ...]
    white: tuple[Cell, ...]
    platelets: tuple[Cell, ...]
    parasites: tuple[int, ...]
    """Indices of the red cells that hold a parasite."""


def corner_of(cell: Cell) -> str:
    """Return the name of the quarter of the picture that holds the cell's centre."""
    return CORNERS[(cell.y >= SIDE / 2) * 2 + (cell.x >= SIDE / 2)]


def sample_smear(seed: int) -> Smear:
    """Draw the truth of one picture at random: stain, density, cells and where they are."""
    rng = random.Random(seed)
    stain, density = rng.choice(list(STAINS)), rng.choice(list(DENSITIES))
    placed: list[Cell] = []
    num_white = rng.choices(range(4), NUM_WHITE_WEIGHTS)[0]
    kind = rng.choice(list(WHITE_CELLS))
    white = _place(rng, placed, [kind] * num_white, WHITE_RADIUS)
    red = _place(rng, placed, ["red"] * rng.randint(*DENSITIES[density]), RED_RADIUS)
    num_platelets = rng.randint(4, 7) if rng.random() < 0.5 else 0
    platelets = _place(rng, placed, ["platelet"] * num_platelets, PLATELET_RADIUS)
    num_parasites = rng.randint(2, 3) if rng.random() < 0.5 else 0
    parasites = tuple(sorted(rng.sample(range(len(red)), min(num_parasites, len(red)))))
    return Smear(seed, stain, density, red, white, platelets, parasites)


def _place(rng: random.Random, placed: list[Cell], kinds: list[str], radius: float) -> tuple[Cell, ...]:
    """Find room for cells one after the other, without overlap where that is possible; adds them to `placed`."""
    cells = []
    for kind in kinds:
        size = radius * rng.uniform(0.9, 1.1)
        best: tuple[float, Cell] | None = None
        for _ in range(60):
            x, y = rng.uniform(size, SIDE - size), rng.uniform(size, SIDE - size)
            # A white cell in the middle of an edge would be in no quarter for certain.
            if radius == WHITE_RADIUS and (abs(x - SIDE / 2) < size / 2 or abs(y - SIDE / 2) < size / 2):
                continue
            gap = min((math.hypot(x - o.x, y - o.y) - size - o.radius for o in placed), default=SIDE)
            if best is None or gap > best[0]:
                best = (gap, Cell(kind, x, y, size))
            if gap > 2:
                break
        if best is not None:
            placed.append(best[1])
            cells.append(best[1])
    return tuple(cells)


def draw(smear: Smear) -> Image.Image:
    """Return the picture of a smear, RGB, `SIDE` x `SIDE`; the same smear gives the same pixels."""
    rng = random.Random(f"details of {smear.seed}")
    background, red_colour = STAINS[smear.stain]
    picture = Image.new("RGB", (SIDE * OVERSAMPLING,) * 2, _shade(rng, background, 6))
    pen = ImageDraw.Draw(picture)
    for index, cell in enumerate(smear.red):
        colour = _shade(rng, red_colour, 10)
        _disc(pen, cell, 1.0, colour)
        _disc(pen, cell, 0.45, _mix(colour, background, 0.45))
        if index in smear.parasites:
            _parasite(pen, rng, cell)
    for cell in smear.platelets:
        _disc(pen, cell, 1.0, _shade(rng, PLATELET_COLOUR, 12))
    for cell in smear.white:
        _white_cell(pen, rng, cell)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _white_cell(pen: ImageDraw.ImageDraw, rng: random.Random, cell: Cell) -> None:
    """Body and nucleus: one large nucleus, two lobes with granules, or three lobes, by the cell's type."""
    body, nucleus = (_shade(rng, colour, 8) for colour in WHITE_CELLS[cell.kind])
    _disc(pen, cell, 1.0, body)
    turn = rng.uniform(0, 2 * math.pi)
    if cell.kind == "lymphocyte":
        _disc(pen, cell, 0.78, nucleus)
        return
    num_lobes, size = (2, 0.42) if cell.kind == "eosinophil" else (3, 0.34)
    if cell.kind == "eosinophil":
        for _ in range(40):
            angle, distance = rng.uniform(0, 2 * math.pi), cell.radius * 0.9 * math.sqrt(rng.random())
            _disc(pen, _moved(cell, angle, distance), 0.07, (214, 84, 40))
    for lobe in range(num_lobes):
        angle = turn + lobe * 2 * math.pi / num_lobes
        _disc(pen, _moved(cell, angle, cell.radius * 0.45), size, nucleus)


def _parasite(pen: ImageDraw.ImageDraw, rng: random.Random, cell: Cell) -> None:
    """A dark ring with a dot on it, inside a red cell."""
    ring = _moved(cell, rng.uniform(0, 2 * math.pi), cell.radius * 0.2)
    box = _box(ring, 0.55)
    pen.ellipse(box, outline=PARASITE_COLOUR, width=round(2.5 * OVERSAMPLING))
    _disc(pen, _moved(ring, rng.uniform(0, 2 * math.pi), ring.radius * 0.5), 0.28, PARASITE_COLOUR)


def _moved(cell: Cell, angle: float, distance: float) -> Cell:
    return cell._replace(x=cell.x + distance * math.cos(angle), y=cell.y + distance * math.sin(angle))


def _box(cell: Cell, scale: float) -> tuple[float, float, float, float]:
    radius = cell.radius * scale
    sides = (cell.x - radius, cell.y - radius, cell.x + radius, cell.y + radius)
    return (sides[0] * OVERSAMPLING, sides[1] * OVERSAMPLING, sides[2] * OVERSAMPLING, sides[3] * OVERSAMPLING)


def _disc(pen: ImageDraw.ImageDraw, cell: Cell, scale: float, colour: Colour) -> None:
    pen.ellipse(_box(cell, scale), fill=colour)


def _shade(rng: random.Random, colour: Colour, spread: int) -> Colour:
    """Return the colour a little lighter or darker."""
    shift = rng.randint(-spread, spread)
    red, green, blue = (min(255, max(0, value + shift)) for value in colour)
    return red, green, blue


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a * (1 - share) + b * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


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
