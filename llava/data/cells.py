"""`llava data cells`: cut windows around labeled cells of smears into a table with one cell per row.

    row with `cells` (type, point or box) --window--> OUT/images/SMEAR-000.png, row (id, image, type, smear, box)

Where only some cells of an image are labeled, the single cell is the only truth. All windows of one smear are in one
split.

Command:
    llava data cells train.json --image-folder images --out cells --fractions train=0.8,test=0.2
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from llava.data.converters.split import SplitOptions, parse_fractions, split_rows
from llava.data.groups import GROUP_FIELDS
from llava.errors import ConfigError, DataError
from llava.imaging.decode import load_image
from llava.samples import row_images, type_and_length
from llava.utils import log
from llava.utils.cli import Parser, check_folder
from llava.utils.files import exclusive_folder
from llava.utils.json_rows import read_records
from llava.utils.jsonl import file_text, open_atomic, write_atomic, write_json
from llava.utils.terminal import write_out

REFERENCE_SIDE = 384
"""Longer side in pixels of the images that the window is stated for; larger images get a larger window."""

MARGIN = 1.2
"""Least side of a window around a box, as a multiple of the longer side of the box."""

KEPT = (*GROUP_FIELDS, "license", "source")
"""Fields of the row of a smear that its cells keep; others, such as counts, are facts of the whole image."""

Corners = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class LabeledCell:
    """Cell of an image.

    Attributes:
        type: its type.
        x: center, 0 to 1 from the left.
        y: center, 0 to 1 from the top.
        width: width of its box as a share of the image; 0 for a point.
        height: height of its box; 0 for a point.
    """

    type: str
    x: float
    y: float
    width: float = 0.0
    height: float = 0.0


def read_cells(row: Mapping[str, Any]) -> list[LabeledCell]:
    """Return the cells of a row.

    Raises:
        DataError: `cells` is missing, or a cell has no type, or neither a point nor a box inside of the image.
    """
    cells = row.get("cells")
    if not isinstance(cells, list):
        raise DataError(f"key 'cells': expected a list of cells (type, point or box), got {type_and_length(cells)}")
    return [_read_cell(cell, f"cells[{index}]") for index, cell in enumerate(cells)]


def _read_cell(cell: Any, where: str) -> LabeledCell:
    if not isinstance(cell, Mapping):
        raise DataError(f"{where}: expected an object, got {type_and_length(cell)}")
    name = cell.get("type")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: key 'type': expected a text, got {type_and_length(name)}")
    if "point" in cell:
        x, y = _shares(cell["point"], 2, f"{where}: key 'point'")
        return LabeledCell(name, x, y)
    if "box" not in cell:
        raise DataError(f"{where}: expected a key 'point' (x, y) or 'box' (x1, y1, x2, y2)")
    left, top, right, bottom = _shares(cell["box"], 4, f"{where}: key 'box'")
    if right <= left or bottom <= top:
        raise DataError(f"{where}: key 'box': expected x1 < x2 and y1 < y2")
    return LabeledCell(name, (left + right) / 2, (top + bottom) / 2, right - left, bottom - top)


def _shares(value: Any, count: int, where: str) -> list[float]:
    """Return numbers from 0 to 1."""
    numbers = value if isinstance(value, list) else []
    good = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n <= 1]
    if len(good) != count or len(numbers) != count:
        raise DataError(f"{where}: expected {count} numbers from 0 to 1")
    return [float(number) for number in good]


def window_of(cell: LabeledCell, size: tuple[int, int], *, side: int) -> tuple[int, int, int, int]:
    """Return the square window around a cell as left, top, right, bottom; it may extend beyond the image.

    Args:
        cell: the cell.
        size: width and height of the image in pixels.
        side: side of the window in an image whose longer side is `REFERENCE_SIDE` pixels.
    """
    width, height = size
    wanted = max(side * max(size) / REFERENCE_SIDE, MARGIN * max(cell.width * width, cell.height * height))
    pixels = max(1, round(wanted))
    left, top = math.floor(cell.x * width) - pixels // 2, math.floor(cell.y * height) - pixels // 2
    return left, top, left + pixels, top + pixels


def cut_window(image: Image.Image, window: tuple[int, int, int, int]) -> Image.Image:
    """Return a window of an RGB image; the part beyond the image is filled with its median color."""
    left, top, right, bottom = window
    part = Image.new("RGB", (right - left, bottom - top), _median_color(image))
    inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    if inside[0] < inside[2] and inside[1] < inside[3]:
        part.paste(image.crop(inside), (inside[0] - left, inside[1] - top))
    return part


def _median_color(image: Image.Image) -> tuple[int, int, int]:
    counts = image.histogram()
    found = []
    for channel in range(3):
        half, seen = image.width * image.height / 2, 0
        for value, count in enumerate(counts[256 * channel : 256 * channel + 256]):
            seen += count
            if seen >= half:
                found.append(value)
                break
    return found[0], found[1], found[2]


def cell_rows(
    row: Mapping[str, Any], *, folder: Path, out: Path, side: int, types: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Write the windows of the cells of one row to `out`; return their rows.

    Raises:
        DataError: the cells or the image cannot be used.
    """
    names = row_images(row)
    if len(names) != 1:
        raise DataError(f"expected one image, got {len(names)}")
    cells = [(index, cell) for index, cell in enumerate(read_cells(row)) if not types or cell.type in types]
    if not cells:
        return []
    smear = str(row.get("id") or PurePosixPath(names[0]).stem)
    image = load_image(names[0], folder)
    kept = {key: row[key] for key in KEPT if isinstance(row.get(key), str | int)}
    rows = []
    for index, cell in cells:
        window = window_of(cell, image.size, side=side)
        name = f"{_file_name(smear)}-{index:03d}"
        buffer = io.BytesIO()
        cut_window(image, window).save(buffer, format="png")
        write_atomic(out / f"{name}.png", buffer.getvalue())
        box = [round(edge / length, 4) for edge, length in zip(window, image.size * 2, strict=True)]
        rows.append({"id": name, "image": f"{name}.png", "type": cell.type, "smear": smear, "box": box, **kept})
    return rows


def _file_name(smear: str) -> str:
    """Return the id of a smear as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in smear)[:100] or "smear"


def make_parser() -> Parser:
    """Return the parser of `llava data cells`."""
    parser = Parser(prog="llava data cells", description="Cut a window around every labeled cell of smears.")
    parser.add_argument("files", nargs="+", type=Path, help="rows with image and cells (type, point or box, 0 to 1)")
    parser.add_argument("--image-folder", required=True, type=Path, help="folder of the images")
    parser.add_argument("--out", required=True, type=Path, help="output folder: a table per split, and images/")
    parser.add_argument(
        "--window",
        type=int,
        default=56,
        help=f"side in pixels, for images of {REFERENCE_SIDE} pixels; boxes may need more",
    )
    parser.add_argument("--types", nargs="+", default=[], help="cut these types only")
    parser.add_argument("--fractions", help="split by smear, such as train=0.8,test=0.2; default: a table per file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the windows and tables of all files.

    Raises:
        ConfigError: the options contradict each other.
        DataError: a row cannot be used; the message names file and row.
    """
    args = make_parser().parse_args(argv)
    check_folder(args.image_folder, "--image-folder")
    if not 8 <= args.window <= REFERENCE_SIDE:
        raise ConfigError(f"--window must be from 8 to {REFERENCE_SIDE}, got {args.window}")
    fractions = parse_fractions(args.fractions) if args.fractions else None
    stems = [path.stem for path in args.files]
    if fractions is None and len(set(stems)) < len(stems):
        raise ConfigError("two files have the same name; rename one, or pass --fractions")
    with exclusive_folder(args.out, option="--out"):
        tables: dict[str, list[dict[str, Any]]] = {stem: [] for stem in stems}
        for stem, rows in _windows(args.files, args.image_folder, args.out / "images", args.window, args.types):
            tables[stem] += rows
        if fractions is not None:
            tables = _by_smear([row for rows in tables.values() for row in rows], fractions, args.seed)
        _write(args.out, tables, {"window": args.window, "fractions": fractions, "seed": args.seed})


def _windows(
    files: Sequence[Path], folder: Path, out: Path, side: int, types: Sequence[str] = ()
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the name of a file and the rows of the cells of one of its smears."""
    seen: dict[str, str] = {}
    for path in files:
        for index, row in enumerate(log.with_progress(list(read_records(path)), title=path.name, unit="smear")):
            try:
                rows = cell_rows(row, folder=folder, out=out, side=side, types=types)
            except DataError as error:
                raise DataError(f"{path}, row {index}: {error}") from None
            name = _file_name(rows[0]["smear"]) if rows else ""
            where = f"{path}, row {index}"
            if name in seen:
                raise DataError(f"{where}: smear {name!r} has the id of {seen[name]}; ids must be unique")
            if name:
                seen[name] = where
            yield path.stem, rows


def _by_smear(rows: list[dict[str, Any]], fractions: Mapping[str, float], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each split; no smear is in two splits."""
    options = SplitOptions(("patient",), fractions, seed, key="smear")
    places = split_rows(rows, options, name="cells")
    return {split: [row for row, place in zip(rows, places, strict=True) if place == split] for split in fractions}


def _write(out: Path, tables: Mapping[str, list[dict[str, Any]]], facts: Mapping[str, Any]) -> None:
    """Write the tables, then the manifest, and print the number of cells of each type."""
    if not any(tables.values()):
        raise DataError("no row has a cell of these types")
    counts = {}
    for name, rows in tables.items():
        with open_atomic(out / f"{name}.json") as stream:
            stream.writelines(file_text(rows))
        found = dict(Counter(row["type"] for row in rows).most_common())
        counts[name] = {"cells": len(rows), "smears": len({row["smear"] for row in rows}), "types": found}
        types = ", ".join(f"{kind} {number}" for kind, number in found.items())
        write_out(f"{out / name}.json: {len(rows)} cells of {counts[name]['smears']} smears: {types}\n")
    write_json(out / "manifest.json", {**facts, "tables": counts})


if __name__ == "__main__":
    main()
