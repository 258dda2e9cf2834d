"""SYNTHETIC blood-smear drawings, questions about them, and a data folder of many in LLaVA format.

    DIR/images/*.png   DIR/captions.json (alignment)   DIR/train.json   DIR/test.json (about other drawings)
    DIR/smears-train.json   DIR/smears-test.json (tables of the truth, for the rule set `drawn-smears`)

Within each file and question type, every answer occurs equally often, so a model that ignores the image, or always
gives the most common answer, is as accurate as guessing.
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
"""Side of an image in pixels."""

OVERSAMPLING = 2
"""Factor by which images are drawn larger and then reduced, for smooth edges."""

Color = tuple[int, int, int]

STAINS: dict[str, tuple[Color, Color]] = {
    "pink": ((246, 214, 222), (222, 128, 140)),
    "blue": ((206, 220, 242), (190, 122, 150)),
    "yellow": ((246, 238, 200), (216, 136, 116)),
}
"""Colors of the background and of the red cells, by name of the stain."""

WHITE_CELLS: dict[str, tuple[Color, Color]] = {
    "neutrophil": ((226, 206, 232), (92, 40, 140)),
    "lymphocyte": ((150, 180, 232), (62, 34, 128)),
    "eosinophil": ((246, 170, 120), (112, 44, 130)),
}
"""Colors of the cell body and of the nucleus, by type."""

DENSITIES = {"sparse": (4, 7), "moderate": (12, 16), "crowded": (24, 30)}
"""Smallest and largest number of red cells, by name of the density."""

NUM_WHITE_WEIGHTS = (0.40, 0.32, 0.14, 0.14)
"""Probabilities of 0, 1, 2 and 3 white cells."""

RED_RADIUS, WHITE_RADIUS, PLATELET_RADIUS = 12.0, 27.0, 5.0
PLATELET_COLOR: Color = (120, 60, 160)
PARASITE_COLOR: Color = (50, 10, 90)
CORNERS = ("upper left", "upper right", "lower left", "lower right")


class Cell(NamedTuple):
    """Cell of some kind; center and radius in pixels of the image, y downwards."""

    kind: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Smear:
    """Ground truth of one drawing; `seed` fixes small details (shades, lobes)."""

    seed: int
    stain: str
    density: str
    red: tuple[Cell, ...]
    white: tuple[Cell, ...]
    platelets: tuple[Cell, ...]
    parasites: tuple[int, ...]
    """Indices of the red cells that hold a parasite."""


def corner_of(cell: Cell) -> str:
    """Return the name of the quarter of the image that holds the cell's center."""
    return CORNERS[(cell.y >= SIDE / 2) * 2 + (cell.x >= SIDE / 2)]


def sample_smear(seed: int) -> Smear:
    """Return a random ground truth: stain, density, and cells with their positions."""
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
    """Return cells at random positions, without overlap if possible; append them to `placed`."""
    cells = []
    for kind in kinds:
        size = radius * rng.uniform(0.9, 1.1)
        best: tuple[float, Cell] | None = None
        for _ in range(60):
            x, y = rng.uniform(size, SIDE - size), rng.uniform(size, SIDE - size)
            # A white cell across a midline would not be in one quarter.
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


def draw_smear(smear: Smear) -> Image.Image:
    """Return the image of a smear, RGB, `SIDE` x `SIDE`; the same smear gives the same pixels."""
    rng = random.Random(f"details of {smear.seed}")
    background, red_color = STAINS[smear.stain]
    image = Image.new("RGB", (SIDE * OVERSAMPLING,) * 2, _shade(rng, background, 6))
    pen = ImageDraw.Draw(image)
    for index, cell in enumerate(smear.red):
        color = _shade(rng, red_color, 10)
        _disc(pen, cell, 1.0, color)
        _disc(pen, cell, 0.45, _mix(color, background, 0.45))
        if index in smear.parasites:
            _parasite(pen, rng, cell)
    for cell in smear.platelets:
        _disc(pen, cell, 1.0, _shade(rng, PLATELET_COLOR, 12))
    for cell in smear.white:
        _white_cell(pen, rng, cell)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _white_cell(pen: ImageDraw.ImageDraw, rng: random.Random, cell: Cell) -> None:
    """Draw body and nucleus of a white cell: one large nucleus, two lobes with granules, or three lobes."""
    body, nucleus = (_shade(rng, color, 8) for color in WHITE_CELLS[cell.kind])
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
    """Draw a parasite: a dark ring with a dot inside a red cell."""
    ring = _moved(cell, rng.uniform(0, 2 * math.pi), cell.radius * 0.2)
    box = _box(ring, 0.55)
    pen.ellipse(box, outline=PARASITE_COLOR, width=round(2.5 * OVERSAMPLING))
    _disc(pen, _moved(ring, rng.uniform(0, 2 * math.pi), ring.radius * 0.5), 0.28, PARASITE_COLOR)


def _moved(cell: Cell, angle: float, distance: float) -> Cell:
    return cell._replace(x=cell.x + distance * math.cos(angle), y=cell.y + distance * math.sin(angle))


def _box(cell: Cell, scale: float) -> tuple[float, float, float, float]:
    radius = cell.radius * scale
    sides = (cell.x - radius, cell.y - radius, cell.x + radius, cell.y + radius)
    return (sides[0] * OVERSAMPLING, sides[1] * OVERSAMPLING, sides[2] * OVERSAMPLING, sides[3] * OVERSAMPLING)


def _disc(pen: ImageDraw.ImageDraw, cell: Cell, scale: float, color: Color) -> None:
    pen.ellipse(_box(cell, scale), fill=color)


def _shade(rng: random.Random, color: Color, spread: int) -> Color:
    """Return a slightly lighter or darker color."""
    shift = rng.randint(-spread, spread)
    red, green, blue = (min(255, max(0, value + shift)) for value in color)
    return red, green, blue


def _mix(first: Color, second: Color, share: float) -> Color:
    red, green, blue = (round(a * (1 - share) + b * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


NOTICE = "SYNTHETIC drawing made by a program; not a photograph, no medical content"
"""Text in the metadata of every image and in field `source` of every row, shown with every image."""

NUMBERS = ("zero", "one", "two", "three")
BLOCK = 1_000_000
"""Distance between the drawing seeds of two data sets, so that they share no drawing."""


class SyntheticQuestion(NamedTuple):
    """Question type: name, open or closed, wordings, and its answer for a smear (None: not asked)."""

    name: str
    kind: Literal["OPEN", "CLOSED"]
    wordings: tuple[str, ...]
    answer: Callable[[Smear], str | None]


def _yes(condition: object) -> str:
    return "yes" if condition else "no"


QUESTIONS = (
    SyntheticQuestion(
        "white_presence",
        "CLOSED",
        ("Is a white blood cell visible?", "Is there any white blood cell in the picture?"),
        lambda smear: _yes(smear.white),
    ),
    SyntheticQuestion(
        "platelet_presence",
        "CLOSED",
        ("Are platelets visible?", "Does the picture show platelets?"),
        lambda smear: _yes(smear.platelets),
    ),
    SyntheticQuestion(
        "parasite_presence",
        "CLOSED",
        ("Do any red cells hold a parasite?", "Is a parasite visible?"),
        lambda smear: _yes(smear.parasites),
    ),
    SyntheticQuestion(
        "white_count",
        "OPEN",
        ("How many white blood cells are there?", "What is the number of white blood cells?"),
        lambda smear: NUMBERS[len(smear.white)],
    ),
    SyntheticQuestion(
        "white_type",
        "OPEN",
        ("What type of white blood cell is shown?", "Which white blood cell is this?"),
        lambda smear: smear.white[0].kind if smear.white else None,
    ),
    SyntheticQuestion(
        "white_place",
        "OPEN",
        ("Where is the white blood cell?", "In which quarter is the white blood cell?"),
        lambda smear: corner_of(smear.white[0]) if len(smear.white) == 1 else None,
    ),
    SyntheticQuestion(
        "stain",
        "OPEN",
        ("What is the colour of the background?", "Which colour has the background?"),
        lambda smear: smear.stain,
    ),
    SyntheticQuestion(
        "density",
        "OPEN",
        ("How dense are the red cells?", "What is the density of the red cells?"),
        lambda smear: smear.density,
    ),
)


def smear_caption(smear: Smear) -> str:
    """Return a short description with all facts that the questions ask about."""
    if smear.white:
        kind, number = smear.white[0].kind, len(smear.white)
        place = f" in the {corner_of(smear.white[0])}" if number == 1 else ""
        white = f"{NUMBERS[number]} {kind}{'s' if number > 1 else ''}{place}"
    else:
        white = "no white blood cell"
    platelets = "platelets" if smear.platelets else "no platelets"
    parasites = "parasites" if smear.parasites else "no parasites"
    return f"Synthetic smear, {smear.stain} background, {smear.density} red cells, {white}, {platelets}, {parasites}."


def truth_row(smear: Smear, image: str) -> dict[str, Any]:
    """Return the truth of a drawing as the row of a table."""
    return {
        "id": Path(image).stem,
        "image": image,
        "stain": smear.stain,
        "density": smear.density,
        "num_white": len(smear.white),
        "white_type": smear.white[0].kind if smear.white else "none",
        "platelets": bool(smear.platelets),
        "parasites": bool(smear.parasites),
        "source": NOTICE,
    }


def balanced(rows: Iterable[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Return rows with equally many of every answer within each question type, in their order."""
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
    """Return one row with a random wording for every question type that applies to this drawing."""
    rows = []
    for question in QUESTIONS:
        answer = question.answer(smear)
        if answer is not None:
            identity = f"{Path(image).stem}-{question.name}"
            row = _row(identity, image, f"{IMAGE_TOKEN}\n{rng.choice(question.wordings)}", answer)
            rows.append({**row, "answer_type": question.kind, "question_type": question.name})
    return rows


def pick_rows(rows: Iterable[dict[str, Any]], count: int, *, seed: int) -> list[dict[str, Any]]:
    """Return some questions about as many different images as possible, in their order.

    Args:
        rows: questions in LLaVA format.
        count: number of questions to keep; fewer rows are kept entirely.
        seed: seed of the choice.
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
    """Draw the images and write the record files and tables into `folder`.

    The record files are written last, each under a temporary name first, so `test.json` marks a complete folder.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    captions: list[dict[str, Any]] = []
    questions: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    truths: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    plan = [("train", index) for index in range(num_train)] + [("test", index) for index in range(num_test)]
    for number, (split, index) in enumerate(log.with_progress(plan, title="drawing", unit="image")):
        smear = sample_smear(seed * BLOCK + number)
        image = f"synthetic-{split}-{index:04d}.png"
        notice = PngInfo()
        notice.add_text("Comment", NOTICE)
        draw_smear(smear).save(folder / "images" / image, pnginfo=notice)
        questions[split] += question_rows(smear, image, rng)
        truths[split].append(truth_row(smear, image))
        if split == "train":
            wording = f"{IMAGE_TOKEN}\nDescribe the picture."
            captions.append(_row(f"{Path(image).stem}-caption", image, wording, smear_caption(smear)))
    for split, rows in truths.items():
        write_json(folder / f"smears-{split}.json", rows)
    write_json(folder / "captions.json", captions)
    write_json(folder / "train.json", balanced(questions["train"], rng))
    write_json(folder / "test.json", balanced(questions["test"], rng))
