"""Overlap between a training file and a test file: shared images, persons and questions.

bytes of an image | its pixels | patient or study | question about the same image   -> error
question about another image | only the name of an unopened image                   -> warning
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llava.data.check.images import ImageScan
from llava.data.check.row_index import (
    NOTHING,
    KeyedDigests,
    RowIndex,
    Values,
    as_array,
    common_values,
    group_items,
    is_in,
    repeated_places,
)
from llava.data.check.rules import AGAINST, FILE, CheckFindings

_ODD = np.uint64(0x9E3779B97F4A7C15)
"""Odd multiplier that makes the combination of digests depend on their order."""


def find_leaks(indexes: Sequence[RowIndex], image_scan: ImageScan, findings: CheckFindings) -> None:
    """Report images, persons and questions that the first file shares with the second."""
    if image_scan.opened:
        stored = _shared_images("leak-bytes", as_array(image_scan.contents), image_scan, findings)
        _shared_images("leak-pixels", as_array(image_scan.pixels), image_scan, findings, known=stored)
    else:
        _shared_names(indexes, image_scan, findings)
    for name in indexes[FILE].groups:
        _shared_groups(name, indexes, findings)
    _shared_questions(indexes, image_scan, findings)


def _shared_images(
    rule: str, keys: Values, image_scan: ImageScan, findings: CheckFindings, *, known: Values | None = None
) -> Values:
    """Report images with the same key in both files; return the places of those of the first file.

    Args:
        rule: rule that they violate.
        keys: digest of every image.
        image_scan: images of both files.
        findings: receives the findings.
        known: places of images of the first file that were already reported.
    """
    own, others = (np.unique(image_scan.of_ref[file]) for file in (FILE, AGAINST))
    if known is not None:
        own = own[~is_in(own, known)]
    shared = common_values(keys[own], keys[others])
    partners = dict(group_items(keys[others], others, shared))
    found: list[NDArray[np.int32]] = []
    for number, group in group_items(keys[own], own, shared):
        found.append(group)
        same = [*group[:5].tolist(), *partners[number][:5].tolist()]
        message = f"{image_scan.name(same[0])} is {image_scan.name(int(partners[number][0]))} of the other file"
        rows, other_rows = image_scan.rows(FILE, group), image_scan.rows(AGAINST, partners[number])
        findings.add(rule, FILE, rows, message, images=list(dict.fromkeys(same)), other_rows=other_rows)
    return np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.int32)


def _shared_names(indexes: Sequence[RowIndex], image_scan: ImageScan, findings: CheckFindings) -> None:
    """Report image names in both files, for images that were not opened."""
    own, others = (as_array(index.refs.digests) for index in indexes)
    shared = common_values(own, others)
    partners = dict(group_items(others, as_array(indexes[AGAINST].refs.rows), shared))
    places = dict(group_items(own, image_scan.of_ref[FILE], shared))
    for number, rows in group_items(own, as_array(indexes[FILE].refs.rows), shared):
        place, others_of = int(places[number][0]), partners[number].tolist()
        findings.add("leak-name", FILE, rows.tolist(), image_scan.name(place), images=[place], other_rows=others_of)


def num_persons(indexes: Sequence[RowIndex]) -> dict[str, list[int]]:
    """Return the number of distinct values in each file by patient or study field, without empty fields."""
    found = {
        name: [len(np.unique(as_array(index.groups[name].digests))) for index in indexes]
        for name in indexes[FILE].groups
    }
    return {name: counts for name, counts in found.items() if any(counts)}


def _shared_groups(name: str, indexes: Sequence[RowIndex], findings: CheckFindings) -> None:
    """Report values of one patient or study field in both files, without showing them."""
    own, others = (index.groups[name] for index in indexes)
    _shared("leak-group", own, others, findings, f"field {name}")


def _shared(rule: str, own: KeyedDigests, others: KeyedDigests, findings: CheckFindings, message: str = "") -> None:
    shared = common_values(as_array(own.digests), as_array(others.digests))
    partners = dict(group_items(as_array(others.digests), as_array(others.rows), shared))
    for number, rows in group_items(as_array(own.digests), as_array(own.rows), shared):
        findings.add(rule, FILE, np.unique(rows).tolist(), message, other_rows=np.unique(partners[number]).tolist())


def _shared_questions(indexes: Sequence[RowIndex], image_scan: ImageScan, findings: CheckFindings) -> None:
    """Report questions in both files: about the same image, or about another one."""
    pairs = [_pairs(index, image_scan, file) for file, index in enumerate(indexes)]
    shared = common_values(pairs[FILE], pairs[AGAINST])
    rows = [as_array(index.questions.rows) for index in indexes]
    partners = dict(group_items(pairs[AGAINST], rows[AGAINST], shared))
    for number, own in group_items(pairs[FILE], rows[FILE], shared):
        findings.add("leak-pair", FILE, np.unique(own).tolist(), other_rows=np.unique(partners[number]).tolist())
    elsewhere = KeyedDigests()
    asked = as_array(indexes[FILE].questions.digests)
    both = common_values(asked, as_array(indexes[AGAINST].questions.digests))
    for place in np.flatnonzero(is_in(asked, both) & ~is_in(pairs[FILE], shared)):
        elsewhere.add(int(asked[place]), int(rows[FILE][place]))
    _shared("leak-question", elsewhere, indexes[AGAINST].questions, findings)


def _pairs(index: RowIndex, image_scan: ImageScan, file: int) -> NDArray[np.uint64]:
    """Return a digest of each question with the images of its row; 0 if an image is unknown."""
    refs = image_scan.of_ref[file]
    identity = as_array(image_scan.pixels)[refs] if image_scan.opened else as_array(index.refs.digests)
    rows = as_array(index.refs.rows)
    known = np.zeros(index.num_rows, dtype=np.uint64)
    unknown = np.zeros(index.num_rows, dtype=np.bool_)
    unknown[rows[identity == 0]] = True
    starts = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]])) if len(rows) else np.empty(0, np.int64)
    sizes = np.diff(np.append(starts, len(rows)))
    for position in range(int(sizes.max(initial=0))):  # i-th image of each row, as the order of images matters
        has = starts[sizes > position] + position
        known[rows[has]] = known[rows[has]] * _ODD + identity[has].astype(np.uint64)
    known[unknown] = 0
    images = known[as_array(index.questions.rows)]
    return np.where(images == 0, np.uint64(0), (images * _ODD) ^ as_array(index.questions.digests)).astype(np.uint64)


def find_repeated_rows(index: RowIndex, file: int, findings: CheckFindings) -> None:
    """Report rows with images and conversation of an earlier row, and other rows that repeat an id."""
    again, firsts = repeated_places(as_array(index.contents))
    for row, first in zip(again, firsts, strict=True):
        findings.add("repeated-row", file, [int(row)], f"first in row {first}")
    ids = as_array(index.ids).copy()
    ids[again] = NOTHING
    for row, first in zip(*repeated_places(ids), strict=True):
        findings.add("repeated-id", file, [int(row)], f"first in row {first}")


def find_same_images(image_scan: ImageScan, file: int, findings: CheckFindings) -> None:
    """Report images of one file with the same pixels under several names."""
    places = np.unique(image_scan.of_ref[file])
    pixels = as_array(image_scan.pixels)[places]
    again, _ = repeated_places(pixels)
    for _, group in group_items(pixels, places, np.unique(pixels[again])):
        rows = image_scan.rows(file, group)
        message = f"{len(group)} names for one image"
        findings.add("same-picture", file, rows, message, images=group[:10].tolist())
