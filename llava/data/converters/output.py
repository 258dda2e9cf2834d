"""Output folder of a converter: `train.json`, `val.json`, `test.json`, `images/` and `manifest.json`.

    ConvertedItem --> image placed --> row into .train.json.part --finish--> train.json ... --last--> manifest.json

A run that is killed leaves images, which the next run reuses, and no JSON file. The manifest has the counts of each
split, the hash of its ids, and what was excluded and why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llava.data.converters.items import ConvertedItem, Excluded, make_row
from llava.data.download.archives import plain_name
from llava.data.quarantine import BadRow, Quarantine
from llava.errors import ConfigError, DataError
from llava.imaging.decode import content_digest
from llava.utils.jsonl import read_object, write_json
from llava.utils.log import warn_once

logger = logging.getLogger(__name__)

PLACEMENTS = ("link", "copy")
ENDINGS = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"II": ".tif", b"MM": ".tif", b"BM": ".bmp"}
"""First two bytes of an image file to the extension."""


def name_of_bytes(data: bytes) -> str:
    """Return a file name from the digest of an image, so that equal images share one file."""
    return f"{content_digest(data)[:20]}{ENDINGS.get(data[:2], '.img')}"


class ImageWriter:
    """Writer of the folder `images/`.

    Args:
        folder: output folder of the images.
        placement: one of `PLACEMENTS`.
    """

    def __init__(self, folder: Path, placement: str) -> None:
        self.folder = folder
        self.placement = placement
        self._placed: dict[str, Path | int] = {}

    def place(self, name: str, image: Path | bytes) -> None:
        """Write an image to the folder, unless an earlier run wrote it.

        Raises:
            DataError: the image cannot be read or written, its name leads out of the folder, or another image has
                the same name.
        """
        if plain_name(name) != name:
            raise DataError(f"image name {name[:200]!r} is not a plain relative path")
        identity = image if isinstance(image, Path) else hash(image)
        if (known := self._placed.get(name)) is not None:
            if known != identity:
                raise DataError(f"two different images have the name {name}")
            return
        target = self.folder / name
        try:
            if not _is_there(target, image):
                target.parent.mkdir(parents=True, exist_ok=True)
                self._write(target, image)
        except OSError as error:
            raise DataError(f"image {name} cannot be written to {self.folder} ({error.strerror or error})") from error
        self._placed[name] = identity

    def _write(self, target: Path, image: Path | bytes) -> None:
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            if isinstance(image, bytes):
                temporary.write_bytes(image)
            elif self.placement == "link":
                self._link(image, temporary)
            else:
                shutil.copy2(image, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _link(self, image: Path, temporary: Path) -> None:
        try:
            os.link(os.path.realpath(image), temporary)
        except FileNotFoundError:
            raise
        except OSError as error:
            warn_once(logger, f"images cannot be hard-linked to {self.folder} ({error.strerror}); copying them instead")
            shutil.copy2(image, temporary)


def _is_there(target: Path, image: Path | bytes) -> bool:
    """Return whether the target is this image: the same file, or one of the same size and time."""
    if not target.is_file():
        return False
    found = target.stat()
    if isinstance(image, bytes):
        return found.st_size == len(image) and target.read_bytes() == image
    wanted = image.stat()
    same_times = (found.st_size, found.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)
    return os.path.samestat(found, wanted) or same_times


COUNTED = ("answer_type", "question_type", "image_organ", "modality", "view", "q_lang")
"""Fields whose values the manifest counts; beyond `MAX_VALUES` values it has the number of distinct ones only."""

MAX_VALUES = 50

MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"


def split_hash(ids: Iterable[str]) -> str:
    """Return the SHA-256 over the sorted ids of a split, each followed by a line feed (UTF-8)."""
    digest = hashlib.sha256()
    for identity in sorted(ids):
        digest.update(f"{identity}\n".encode())
    return digest.hexdigest()


@dataclass(slots=True)
class SplitCount:
    """Ids, images, field values and excluded rows of one split."""

    ids: list[str] = field(default_factory=list)
    images: set[str] = field(default_factory=set)
    values: dict[str, Counter[str]] = field(default_factory=dict)
    excluded: Counter[str] = field(default_factory=Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row to the counts."""
        self.ids.append(str(row["id"]))
        self.images.add(row["image"])
        for name in COUNTED:
            if row.get(name) is not None:
                self.values.setdefault(name, Counter())[str(row[name])] += 1

    def summary(self) -> dict[str, Any]:
        """Return the counts for the manifest."""
        counts: dict[str, Any] = {"rows": len(self.ids), "images": len(self.images), "ids_sha256": split_hash(self.ids)}
        for name, values in self.values.items():
            many = len(values) > MAX_VALUES
            counts[name] = {"different values": len(values)} if many else dict(sorted(values.items()))
        if self.excluded:
            counts["excluded"] = dict(sorted(self.excluded.items()))
        return counts


class ConverterOutput:
    """Output folder of a converter; use it as a context manager and call `finish` at the end.

    Args:
        folder: output folder.
        images: one of `PLACEMENTS`.
        limit: maximum number of rows per split; None for all.
        skip_bad: skip rows that cannot be used and list them in `skipped.jsonl`.
    """

    def __init__(self, folder: str | Path, *, images: str = "link", limit: int | None = None, skip_bad: bool = False):
        self.folder = Path(folder)
        self.limit = limit
        self.skip_bad = skip_bad
        self.counts: dict[str, SplitCount] = {}
        self.num_renamed = 0
        self._images = ImageWriter(self.folder / "images", images)
        self._streams: dict[str, IO[str]] = {}
        self._seen: Counter[str] = Counter()
        self._skipped: list[BadRow] = []

    def __enter__(self) -> ConverterOutput:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        for split, stream in self._streams.items():
            stream.close()
            self._part(split).unlink(missing_ok=True)

    def is_full(self, split: str) -> bool:
        """Return whether a split has `limit` rows."""
        return self.limit is not None and split in self.counts and len(self.counts[split].ids) >= self.limit

    def add(self, event: ConvertedItem | Excluded | BadRow) -> None:
        """Add an event of a converter.

        Raises:
            DataError: a row cannot be used and `skip_bad` is off; the message names file, row and id.
        """
        if isinstance(event, Excluded):
            self._count(event.split).excluded[event.cause] += 1
        elif isinstance(event, BadRow):
            self._bad(event)
        elif not self.is_full(event.split):
            try:
                row = make_row(event)
                self._images.place(event.image_name, event.image)
            except DataError as error:
                self._bad(event.problem(str(error)))
            else:
                self._write(event.split, self._with_own_id(row))

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Move the JSON files into place, then write and return the manifest.

        Raises:
            DataError: no row was written.
        """
        if not self._streams:
            causes = "; ".join(f"{cause}: {n}" for count in self.counts.values() for cause, n in count.excluded.items())
            first = f"; the first bad row: {self._skipped[0]}" if self._skipped else ""
            raise DataError(f"no row can be used{f' ({causes})' if causes else ''}{first}")
        for split, stream in self._streams.items():
            stream.write("\n]\n")
            stream.close()
            os.replace(self._part(split), self.folder / f"{split}.json")
        self._streams = {}
        if self.skip_bad:
            Quarantine(self.folder / SKIPPED).add(self._skipped)
        manifest = {
            **facts,
            "splits": {split: count.summary() for split, count in self.counts.items()},
            "skipped_rows": len(self._skipped),
            "renamed_ids": self.num_renamed,
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _count(self, split: str) -> SplitCount:
        return self.counts.setdefault(split, SplitCount())

    def _part(self, split: str) -> Path:
        return self.folder / f".{split}.json.part"

    def _bad(self, row: BadRow) -> None:
        if not self.skip_bad:
            raise DataError(f"{row} (pass --skip-bad to skip and list such rows)")
        self._skipped.append(row)

    def _with_own_id(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with a unique id; a repeated id gets the suffix `_2`, `_3`, ..."""
        identity = row["id"]
        self._seen[identity] += 1
        if self._seen[identity] == 1:
            return row
        self.num_renamed += 1
        while (fresh := f"{identity}_{self._seen[identity]}") in self._seen:
            self._seen[identity] += 1
        self._seen[fresh] += 1
        return {**row, "id": fresh}

    def _write(self, split: str, row: dict[str, Any]) -> None:
        stream = self._streams.get(split)
        if stream is None:
            stream = open(self._part(split), "w", encoding="utf-8")  # noqa: SIM115 - closed in __exit__ or finish
            self._streams[split] = stream
            stream.write("[\n")
        else:
            stream.write(",\n")
        stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False))
        self._count(split).add(row)


def remove_splits(folder: Path, splits: Iterable[str]) -> None:
    """Remove the files of splits that only an earlier output had; their rows may be in other splits now."""
    for split in splits:
        (folder / f"{split}.json").unlink(missing_ok=True)


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Return the manifest of a complete output, or None if it does not exist.

    Raises:
        ConfigError: the manifest cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        return read_object(path)
    except DataError as error:
        raise ConfigError(f"{error}; remove the manifest to rewrite the folder, or choose another one") from error
