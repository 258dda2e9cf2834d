"""A data file without the rows whose images are missing.

    train.json, images/ --rows_of--> every image there? --yes--> train.available.json

What STLLaVA-Med's users did by hand after a download that was not complete. Rows are kept as they are, and so is the
form of the file, whatever it is called: an array stays an array, lines stay lines.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.check.stream import form_of
from llava.data.records import rows_of
from llava.data.row_file import file_text
from llava.errors import DataError
from llava.imaging.decode import resolve
from llava.samples import read_images
from llava.utils.jsonl import open_atomic


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
