"""Expected images of the packaged files of pydicom: hashes, or 4 x 4 block means of lossy files.

    python -m tests.support.dicom_golden SHEET.png    rewrites dicom_golden.json and a sheet to review first

A changed entry means that other pixels reach the model: raise `dicom_policy.VERSION` with it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pydicom import uid

from llava.errors import DataError
from llava.imaging import decode
from llava.imaging.dicom.header import read_header
from tests.support.dicom_files import corpus

GOLDEN = Path(__file__).with_name("dicom_golden.json")
LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K)
NUM_BLOCKS = 4
TILE = 160


def blocks(image: Image.Image) -> list[float]:
    """Return the mean of each channel in each of 4 x 4 blocks, rounded to hundredths of a gray level."""
    values = np.asarray(image, dtype=np.float64)
    rows, columns = (min(NUM_BLOCKS, side) for side in values.shape[:2])
    parts = [np.array_split(band, columns, axis=1) for band in np.array_split(values, rows, axis=0)]
    return [round(float(mean), 2) for band in parts for part in band for mean in part.mean(axis=(0, 1))]


def describe(path: Path) -> dict[str, Any]:
    """Return size with hash or block means of a file's image, or the kind and end of its error."""
    data = path.read_bytes()
    try:
        image = decode.load_image(data)
    except DataError as error:
        return {"error": type(error).__name__, "says": str(error).removeprefix("image given as bytes ")}
    syntax = read_header(data, (), name=path.name, pixels=False).file_meta.TransferSyntaxUID
    found: dict[str, Any] = {"size": list(image.size)}
    if syntax in LOSSY:
        return {**found, "blocks": blocks(image)}
    return {**found, "sha256": hashlib.sha256(image.tobytes()).hexdigest()[:24]}


def sheet() -> Image.Image:
    """Return all images on one sheet, ten per row."""
    shown = []
    for name, path in corpus():
        try:
            image = decode.load_image(path.read_bytes())
        except DataError:
            continue
        factor = (TILE - 4) / max(image.size)
        size = [max(1, round(side * factor)) for side in image.size]
        shown.append((name, image.resize((size[0], size[1]))))
    page = Image.new("RGB", (10 * TILE, -(-len(shown) // 10) * (TILE + 14)), (60, 0, 60))
    draw = ImageDraw.Draw(page)
    for number, (name, image) in enumerate(shown):
        left, top = number % 10 * TILE, number // 10 * (TILE + 14)
        draw.text((left + 2, top), name[:26], fill=(255, 255, 0))
        page.paste(image, (left + 2, top + 12))
    return page


if __name__ == "__main__":
    found = {name: describe(path) for name, path in corpus()}
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(found.items())]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    sheet().save(sys.argv[1])
