"""The list of images that are missing, and why: written line by line while a run lasts, in order when it ends.

    missing.jsonl: {"pair_id", "image", "archive", "member", "reason", "detail", "tried"}

A run that was killed leaves its lines; the next one believes those whose reason lasts and whose urls it would ask
again, and asks for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.download.failures import REASONS
from llava.data.download.pmc_list import BadListRow, Figure
from llava.data.download.url_policy import shown
from llava.data.records import file_text, form_of, rows_of
from llava.errors import DataError
from llava.imaging.decode import resolve
from llava.samples import read_images
from llava.utils.jsonl import append, drop_torn_line, open_atomic, read_records, write_records


@dataclass(frozen=True, slots=True)
class Missing:
    """One image that is not there.

    Attributes:
        pair_id: the image's id; empty where the list's row has none.
        image: its file name.
        archive: url of its archive, as the list has it.
        member: its name in the archive.
        reason: a word of `REASONS`.
        detail: what happened, for people.
        tried: the urls that were asked, or would be.
        place: row in the lists, which orders the file.
    """

    pair_id: str
    image: str
    archive: str
    member: str
    reason: str
    detail: str
    tried: tuple[str, ...] = ()
    place: int = field(default=-1, compare=False)

    @classmethod
    def of(cls, figure: Figure, archive: str, reason: str, detail: str, tried: Sequence[str]) -> Missing:
        """Return the line of a figure that no source has."""
        places = tuple(map(shown, tried))
        return cls(
            figure.pair_id, figure.file_name, shown(archive), figure.member, reason, detail, places, figure.place
        )

    @classmethod
    def of_bad_row(cls, row: BadListRow) -> Missing:
        """Return the line of a list's row that cannot be used."""
        return cls(row.pair_id, "", "", "", "bad_row", row.detail, (), row.place)

    def settles(self, figure: Figure, tried: Collection[str]) -> bool:
        """Whether asking `tried` for the figure again would give the same."""
        reason = REASONS.get(self.reason)
        asked = set(map(shown, tried))
        return reason is not None and reason.lasting and self.member == figure.member and asked <= set(self.tried)


class MissingList:
    """The list while a run lasts.

    Args:
        path: the file.

    Raises:
        DataError: there is a file of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before: dict[str, Missing] = {}
        self._rows: list[Missing] = []
        drop_torn_line(path)
        for row in read_records(path) if path.exists() else ():
            try:
                before = Missing(**{**row, "tried": tuple(row["tried"])})
            except (TypeError, KeyError) as error:
                raise DataError(
                    f"{path} is not a list of missing images; it would be overwritten: name another file by --missing"
                ) from error
            self._before[before.pair_id] = before

    def __len__(self) -> int:
        return len(self._rows)

    def known(self, pair_id: str) -> Missing | None:
        """Return what an earlier run wrote about an image."""
        return self._before.get(pair_id)

    def add(self, rows: Sequence[Missing]) -> None:
        """Add lines; those that an earlier run wrote already are not written again."""
        for row in rows:
            self._rows.append(row)
            if self._before.get(row.pair_id) != row:
                append(self.path, asdict(row))

    def finish(self) -> dict[str, int]:
        """Write the list of this run in the order of the lists; return how many images are missing for each reason."""
        self._rows.sort(key=lambda row: row.place)
        write_records(self.path, map(asdict, self._rows))
        counts = Counter(row.reason for row in self._rows)
        return {reason: counts[reason] for reason in REASONS if counts[reason]}


class Filtered(NamedTuple):
    """What `write_available` did."""

    path: Path
    num_kept: int
    num_dropped: int


def available_path(path: Path) -> Path:
    """Return the name of the filtered file: `train.json` becomes `train.available.json`."""
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    return path.with_name(path.name.removesuffix(ending) + ".available" + ending.removesuffix(".gz"))


def write_available(path: Path, image_folder: Path) -> Filtered:
    """Write the rows whose images are all in `image_folder` (rows without an image too) beside the file.

    Raises:
        DataError: the file cannot be read or a row's images cannot be; nothing is written then.
    """
    target = available_path(path)
    num_kept = num_dropped = 0

    def complete() -> Iterator[dict[str, Any]]:
        nonlocal num_kept, num_dropped
        for row in _rows(path):
            if _complete(row, image_folder):
                num_kept += 1
                yield row
            else:
                num_dropped += 1

    try:
        with open_atomic(target) as stream:
            stream.writelines(file_text(complete(), lines=form_of(path) == "lines"))
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror or error}") from error
    return Filtered(target, num_kept, num_dropped)


def pair_ids(paths: Collection[str | Path]) -> set[str]:
    """Return the ids (file names without ending) of all images that the rows of data files name."""
    return {Path(name).stem for path in paths for row in _rows(Path(path)) for name in read_images(row.get("image"))}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in rows_of(path):
        if isinstance(row, DataError):
            raise DataError(f"{path}, row {number}: {row}")
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: a row must be a JSON object, got {type(row).__name__}")
        try:
            read_images(row.get("image"))
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        yield row


def _complete(row: dict[str, Any], image_folder: Path) -> bool:
    return all(_is_file(name, image_folder) for name in read_images(row.get("image")))


def _is_file(name: str, image_folder: Path) -> bool:
    try:
        return resolve(name, image_folder).is_file()
    except DataError:  # outside the folder: no image of ours
        return False
