"""What is in one file more than once: rows, ids, and pictures under several names."""

from __future__ import annotations

import numpy as np

from llava.data.check.digests import NOTHING
from llava.data.check.findings import Findings
from llava.data.check.images import Pictures
from llava.data.check.row_index import Ledger, view
from llava.data.check.rows_by_key import grouped, repeats


def find_repeated_rows(ledger: Ledger, file: int, findings: Findings) -> None:
    """Report rows with the images and the conversation of an earlier row, and other rows with its id."""
    again, firsts = repeats(view(ledger.contents))
    for row, first in zip(again, firsts, strict=True):
        findings.add("repeated-row", file, [int(row)], f"first in row {first}")
    ids = view(ledger.ids).copy()
    ids[again] = NOTHING
    for row, first in zip(*repeats(ids), strict=True):
        findings.add("repeated-id", file, [int(row)], f"first in row {first}")


def find_same_pictures(pictures: Pictures, file: int, findings: Findings) -> None:
    """Report pictures of one file that have the same pixels under several names."""
    places = np.unique(pictures.of_ref[file])
    pixels = view(pictures.pixels)[places]
    again, _ = repeats(pixels)
    for _, group in grouped(pixels, places, np.unique(pixels[again])):
        rows = pictures.rows(file, group)
        message = f"{len(group)} names for one picture"
        findings.add("same-picture", file, rows, message, images=group[:10].tolist())
