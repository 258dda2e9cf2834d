"""What two files share although one is to be trained on and the other is to judge: pictures, persons, questions.

bytes of a picture | its pixels | patient or study | question about the same picture   -> error
question about another picture | only the name of a picture, unopened                  -> warning
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llava.data.check.images import Pictures
from llava.data.check.row_index import NOTHING, Keyed, Ledger, Values, common, grouped, is_in, repeats, view
from llava.data.check.rules import AGAINST, FILE, Findings

_ODD = np.uint64(0x9E3779B97F4A7C15)
"""Mixes numbers that are combined, so that their order counts."""


def find_leaks(ledgers: Sequence[Ledger], pictures: Pictures, findings: Findings) -> None:
    """Report everything that the first file shares with the second."""
    if pictures.opened:
        stored = _shared_pictures("leak-bytes", view(pictures.contents), pictures, findings)
        _shared_pictures("leak-pixels", view(pictures.pixels), pictures, findings, known=stored)
    else:
        _shared_names(ledgers, pictures, findings)
    for name in ledgers[FILE].groups:
        _shared_groups(name, ledgers, findings)
    _shared_questions(ledgers, pictures, findings)


def _shared_pictures(
    rule: str, keys: Values, pictures: Pictures, findings: Findings, *, known: Values | None = None
) -> Values:
    """Report pictures with the same number in both files; returns the places of those of the first file.

    Args:
        rule: the rule they break.
        keys: number of every picture.
        pictures: the pictures of both files.
        findings: where they are reported.
        known: places of pictures of the first file that are reported already.
    """
    own, others = (np.unique(pictures.of_ref[file]) for file in (FILE, AGAINST))
    if known is not None:
        own = own[~is_in(own, known)]
    shared = common(keys[own], keys[others])
    partners = dict(grouped(keys[others], others, shared))
    found: list[NDArray[np.int32]] = []
    for number, group in grouped(keys[own], own, shared):
        found.append(group)
        same = [*group[:5].tolist(), *partners[number][:5].tolist()]
        message = f"{pictures.name(same[0])} is {pictures.name(int(partners[number][0]))} of the other file"
        rows, other_rows = pictures.rows(FILE, group), pictures.rows(AGAINST, partners[number])
        findings.add(rule, FILE, rows, message, images=list(dict.fromkeys(same)), other_rows=other_rows)
    return np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.int32)


def _shared_names(ledgers: Sequence[Ledger], pictures: Pictures, findings: Findings) -> None:
    """Report image names of both files where nobody opened the pictures."""
    own, others = (view(ledger.refs.digests) for ledger in ledgers)
    shared = common(own, others)
    partners = dict(grouped(others, view(ledgers[AGAINST].refs.rows), shared))
    places = dict(grouped(own, pictures.of_ref[FILE], shared))
    for number, rows in grouped(own, view(ledgers[FILE].refs.rows), shared):
        place, others_of = int(places[number][0]), partners[number].tolist()
        findings.add("leak-name", FILE, rows.tolist(), pictures.name(place), images=[place], other_rows=others_of)


def num_persons(ledgers: Sequence[Ledger]) -> dict[str, list[int]]:
    """Return how many different values each patient or study field has in each file, where it has any."""
    found = {
        name: [len(np.unique(view(ledger.groups[name].digests))) for ledger in ledgers] for name in ledgers[FILE].groups
    }
    return {name: counts for name, counts in found.items() if any(counts)}


def _shared_groups(name: str, ledgers: Sequence[Ledger], findings: Findings) -> None:
    """Report values of one patient or study field that are in both files; the value itself is not shown."""
    own, others = (ledger.groups[name] for ledger in ledgers)
    _shared("leak-group", own, others, findings, f"field {name}")


def _shared(rule: str, own: Keyed, others: Keyed, findings: Findings, message: str = "") -> None:
    shared = common(view(own.digests), view(others.digests))
    partners = dict(grouped(view(others.digests), view(others.rows), shared))
    for number, rows in grouped(view(own.digests), view(own.rows), shared):
        findings.add(rule, FILE, np.unique(rows).tolist(), message, other_rows=np.unique(partners[number]).tolist())


def _shared_questions(ledgers: Sequence[Ledger], pictures: Pictures, findings: Findings) -> None:
    """Report questions of both files: about the same picture, or about another one."""
    pairs = [_pairs(ledger, pictures, file) for file, ledger in enumerate(ledgers)]
    shared = common(pairs[FILE], pairs[AGAINST])
    rows = [view(ledger.questions.rows) for ledger in ledgers]
    partners = dict(grouped(pairs[AGAINST], rows[AGAINST], shared))
    for number, own in grouped(pairs[FILE], rows[FILE], shared):
        findings.add("leak-pair", FILE, np.unique(own).tolist(), other_rows=np.unique(partners[number]).tolist())
    elsewhere = Keyed()
    asked = view(ledgers[FILE].questions.digests)
    both = common(asked, view(ledgers[AGAINST].questions.digests))
    for place in np.flatnonzero(is_in(asked, both) & ~is_in(pairs[FILE], shared)):
        elsewhere.add(int(asked[place]), int(rows[FILE][place]))
    _shared("leak-question", elsewhere, ledgers[AGAINST].questions, findings)


def _pairs(ledger: Ledger, pictures: Pictures, file: int) -> NDArray[np.uint64]:
    """Return a number for each question together with the pictures of its row; 0 where those are not known."""
    refs = pictures.of_ref[file]
    identity = view(pictures.pixels)[refs] if pictures.opened else view(ledger.refs.digests)
    rows = view(ledger.refs.rows)
    known = np.zeros(ledger.num_rows, dtype=np.uint64)
    unknown = np.zeros(ledger.num_rows, dtype=np.bool_)
    unknown[rows[identity == 0]] = True
    starts = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]])) if len(rows) else np.empty(0, np.int64)
    sizes = np.diff(np.append(starts, len(rows)))
    for position in range(int(sizes.max(initial=0))):  # images of a row, one after the other: their order counts
        has = starts[sizes > position] + position
        known[rows[has]] = known[rows[has]] * _ODD + identity[has].astype(np.uint64)
    known[unknown] = 0
    picture = known[view(ledger.questions.rows)]
    return np.where(picture == 0, np.uint64(0), (picture * _ODD) ^ view(ledger.questions.digests)).astype(np.uint64)


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
