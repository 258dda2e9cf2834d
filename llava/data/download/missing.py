"""List of missing images with reasons: appended during a run, sorted at its end.

    missing.jsonl: {"pair_id", "image", "archive", "member", "reason", "detail", "tried"}

After a killed run, the next one keeps the lines whose reason is lasting and whose URLs include all it would try, and
retries the other images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.download.pmc_list import BadListRow, Figure
from llava.data.download.transfer import REASONS
from llava.data.download.url_policy import redacted_url
from llava.errors import DataError
from llava.imaging.decode import resolve_image_path
from llava.samples import row_images
from llava.utils.json_rows import form_of, read_records, read_rows
from llava.utils.jsonl import append_record, drop_incomplete_line, file_text, open_atomic, write_records


@dataclass(frozen=True, slots=True)
class Missing:
    """Missing image.

    Attributes:
        pair_id: id of the image; empty if the row of the list has none.
        image: its file name.
        archive: URL of its archive, as in the list.
        member: its name in the archive.
        reason: a key of `REASONS`.
        detail: description of the failure.
        tried: URLs of the sources.
        place: index of its row in the lists, the order of the file.
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
        """Return the entry of a figure that no source has."""
        places = tuple(map(redacted_url, tried))
        return cls(
            figure.pair_id, figure.file_name, redacted_url(archive), figure.member, reason, detail, places, figure.place
        )

    @classmethod
    def of_bad_row(cls, row: BadListRow) -> Missing:
        """Return the entry of an invalid row of a list."""
        return cls(row.pair_id, "", "", "", "bad_row", row.detail, (), row.place)

    def settles(self, figure: Figure, tried: Collection[str]) -> bool:
        """Return whether a retry of the figure with the URLs `tried` would give the same result."""
        reason = REASONS.get(self.reason)
        asked = set(map(redacted_url, tried))
        return reason is not None and reason.lasting and self.member == figure.member and asked <= set(self.tried)


class MissingList:
    """List of missing images during a run.

    Args:
        path: the file.

    Raises:
        DataError: the path is a file of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before: dict[str, Missing] = {}
        self._rows: list[Missing] = []
        drop_incomplete_line(path)
        for row in read_records(path) if path.exists() else ():
            try:
                before = Missing(**{**row, "tried": tuple(row["tried"])})
            except (TypeError, KeyError) as error:
                raise DataError(
                    f"{path} is not a list of missing images and would be overwritten; name another file with --missing"
                ) from error
            self._before[before.pair_id] = before

    def __len__(self) -> int:
        return len(self._rows)

    def known(self, pair_id: str) -> Missing | None:
        """Return the entry that an earlier run wrote for an image; None without one."""
        return self._before.get(pair_id)

    def add(self, rows: Sequence[Missing]) -> None:
        """Add entries and append them to the file, except those that an earlier run wrote."""
        for row in rows:
            self._rows.append(row)
            if self._before.get(row.pair_id) != row:
                append_record(self.path, asdict(row))

    def finish(self) -> dict[str, int]:
        """Rewrite the file in the order of the lists and return the number of missing images by reason."""
        self._rows.sort(key=lambda row: row.place)
        write_records(self.path, map(asdict, self._rows))
        counts = Counter(row.reason for row in self._rows)
        return {reason: counts[reason] for reason in REASONS if counts[reason]}


class Filtered(NamedTuple):
    """Filtered data file with its numbers of kept and dropped rows."""

    path: Path
    num_kept: int
    num_dropped: int


def available_path(path: Path) -> Path:
    """Return the name of the filtered file: `train.json` becomes `train.available.json`."""
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    return path.with_name(path.name.removesuffix(ending) + ".available" + ending.removesuffix(".gz"))


def write_available(path: Path, image_folder: Path) -> Filtered:
    """Write the rows of a data file that have no missing images to a file beside it.

    Raises:
        DataError: the file or the images field of a row is invalid; no file is written.
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
    """Return the ids (file names without extension) of all images that the rows of data files name."""
    return {Path(name).stem for path in paths for row in _rows(Path(path)) for name in row_images(row)}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in read_rows(path):
        if isinstance(row, DataError):
            raise DataError(f"{path}, row {number}: {row}")
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: a row must be a JSON object, got {type(row).__name__}")
        try:
            row_images(row)
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        yield row


def _complete(row: dict[str, Any], image_folder: Path) -> bool:
    return all(_is_file(name, image_folder) for name in row_images(row))


def _is_file(name: str, image_folder: Path) -> bool:
    try:
        return resolve_image_path(name, image_folder).is_file()
    except DataError:  # a path outside the folder
        return False
