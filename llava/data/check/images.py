"""Scan of the images that the rows name: each image is opened, decoded and hashed once.

    names of both files --each once--> threads: read, decode, hash --> flat arrays, 45 bytes per image

Two images are the same if the bytes of their files or their decoded pixels are equal; they are near-duplicates by their
perceptual hash. The small gray copies that confirm near-duplicates are in a temporary file.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llava.data.check.row_index import NameStore, RowIndex, as_array, digest_bytes, uint32_array, uint64_array
from llava.errors import DataError, MissingDependency
from llava.imaging import decode
from llava.utils.log import with_progress

SIDE = 32
"""Side length of the small gray copy that is hashed, in pixels."""

LOW = 8
"""Frequencies per direction, including the constant one."""


def _cosines() -> NDArray[np.float64]:
    """Return the first `LOW` rows of the orthonormal DCT-II matrix of size `SIDE`: [LOW, SIDE]."""
    k, n = np.arange(LOW)[:, None], np.arange(SIDE)[None, :]
    matrix = np.sqrt(2.0 / SIDE) * np.cos(math.pi * (2 * n + 1) * k / (2 * SIDE))
    matrix[0] /= math.sqrt(2.0)
    return np.asarray(matrix)


_COSINES = _cosines()


def small_gray(image: Image.Image, side: int = SIDE) -> NDArray[np.uint8]:
    """Return an image as gray values [side, side], each the average over its area."""
    # reducing_gap first reduces by an integer factor, which is fast, then resizes smoothly.
    small = image.convert("L").resize((side, side), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(small)


def perceptual_hash(gray: NDArray[np.uint8]) -> int:
    """Return the 64-bit hash of gray values [32, 32].

    Bit 8 * v + u belongs to the horizontal frequency u and the vertical frequency v.
    """
    frequencies = _COSINES @ gray.astype(np.float64) @ _COSINES.T
    bits = (frequencies > np.median(frequencies)).reshape(-1)
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def pixel_correlation(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Return the Pearson correlation of two gray images of one shape; 1 for equal constant images."""
    one, other = first.astype(np.float64), second.astype(np.float64)
    one, other = one - one.mean(), other - other.mean()
    scale = math.sqrt(float((one * one).sum()) * float((other * other).sum()))
    if scale == 0.0:
        return 1.0 if np.array_equal(first, second) else 0.0
    return float((one * other).sum()) / scale


T = TypeVar("T")
R = TypeVar("R")

STATES = ("", "image-missing", "image-broken")
"""Rules by state of an image; the empty string is for an image that decodes."""

MAX_MESSAGES = 10_000
"""Maximum number of stored error messages: with a wrong folder, every image is missing."""

_MEMORY_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")


class InspectedImage(NamedTuple):
    """Result for one image file; `rule` is empty for an image that decodes."""

    rule: str = ""
    message: str = ""
    content: int = 0
    pixels: int = 0
    hash: int = 0
    width: int = 0
    height: int = 0
    kind: str = ""
    small: bytes = b""


def inspect_image(name: str, root: Path) -> InspectedImage:
    """Read, decode and hash the image `name` in folder `root`."""
    try:
        data = decode.read_image_bytes(name, root)
    except decode.IrregularFile as error:
        return InspectedImage("image-broken", str(error))
    except DataError as error:
        return InspectedImage("image-missing", str(error))
    try:
        image = decode.load_image(data)
    except (DataError, MissingDependency) as error:
        return InspectedImage("image-broken", _MEMORY_ADDRESS.sub("", str(error)).replace("given as bytes", name))
    width, height = image.size
    small = small_gray(image)
    return InspectedImage(
        content=digest_bytes(data),
        pixels=digest_bytes(f"{width} x {height}\n".encode() + image.tobytes()),
        hash=perceptual_hash(small),
        width=width,
        height=height,
        kind=decode.stored_format(data),
        small=small.tobytes(),
    )


def in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], *, ahead: int) -> Iterator[R]:
    """Yield `work(item)` in order, with at most `ahead` pending items to limit memory."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class ImageScan:
    """Distinct images of one or two files; an image is identified by its place in the scan.

    Args:
        indexes: row index of each file.
        names: image names that the indexes refer to.
        roots: image folder of each file; None leaves its images unopened.

    Attributes:
        of_ref: for each file, the place of every image that its rows name, in the order of `index.refs`.
        opened: whether the images were opened.
    """

    def __init__(self, indexes: Sequence[RowIndex], names: NameStore, roots: Sequence[Path | None]) -> None:
        refs = np.concatenate([as_array(index.refs.digests) for index in indexes])
        places = np.concatenate([as_array(index.places) for index in indexes])
        _, first, inverse = np.unique(refs, return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")  # order of appearance, so that messages are in file order
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        edges = np.cumsum([len(index.refs.digests) for index in indexes])[:-1]
        self.of_ref: list[NDArray[np.int32]] = np.split(rank[inverse], edges)
        self._rows = [as_array(index.refs.rows) for index in indexes]
        self._sorted: list[tuple[NDArray[np.int32], NDArray[np.int32]] | None] = [None] * len(indexes)
        self.names = names
        self.places = places[first[order]]
        owner = np.searchsorted(edges, first[order], side="right").astype(np.uint8)
        self.owners: NDArray[np.uint8] = owner
        self.roots = roots
        self.opened = False
        self.contents, self.pixels, self.hashes = uint64_array(), uint64_array(), uint64_array()
        self.widths, self.heights, self.kinds = uint32_array(), uint32_array(), array("B")
        self.kind_names: list[str] = []
        self.states = array("B")
        self._messages: dict[int, str] = {}
        self._small: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object

    def __len__(self) -> int:
        return len(self.places)

    def name(self, place: int) -> str:
        """Return the name of an image in the rows."""
        return self.names.get(int(self.places[place]))

    def root(self, place: int) -> Path | None:
        """Return the folder of an image."""
        return self.roots[int(self.owners[place])]

    def open_all(self, *, num_threads: int | None = None) -> None:
        """Open every image with several threads and a progress bar."""
        num_threads = num_threads or os.cpu_count() or 1
        wanted = ((self.name(place), self.root(place)) for place in range(len(self)))
        pool = ThreadPoolExecutor(num_threads)
        try:
            results = in_order(pool, lambda item: _inspect_if(*item), wanted, ahead=64 * num_threads)
            for place, seen in enumerate(with_progress(results, title="images", total=len(self), unit="image")):
                self._keep(place, seen)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        self.opened = True

    def _keep(self, place: int, seen: InspectedImage) -> None:
        self.contents.append(seen.content)
        self.pixels.append(seen.pixels)
        self.hashes.append(seen.hash)
        self.widths.append(seen.width)
        self.heights.append(seen.height)
        if seen.kind not in self.kind_names and len(self.kind_names) < 255:
            self.kind_names.append(seen.kind)
        self.kinds.append(self.kind_names.index(seen.kind) if seen.kind in self.kind_names else 0)
        self._small.write(seen.small or bytes(SIDE * SIDE))
        self.states.append(STATES.index(seen.rule))
        if seen.rule and len(self._messages) < MAX_MESSAGES:
            self._messages[place] = seen.message

    def rows(self, file: int, places: NDArray[np.integer]) -> list[int]:
        """Return the distinct rows of a file that name any of these images, sorted."""
        if self._sorted[file] is None:
            order = np.argsort(self.of_ref[file], kind="stable").astype(np.int32)
            self._sorted[file] = (order, self.of_ref[file][order])
        order, keys = cast(tuple[NDArray[np.int32], NDArray[np.int32]], self._sorted[file])
        starts, stops = (np.searchsorted(keys, places, side=side) for side in ("left", "right"))
        refs = np.concatenate([order[low:high] for low, high in zip(starts, stops, strict=True)])
        return cast(list[int], np.unique(self._rows[file][refs]).tolist())

    def is_bad(self, place: int) -> bool:
        """Return whether an image is missing or does not decode."""
        return self.opened and self.states[place] != 0

    def bad(self) -> Iterator[tuple[int, str, str]]:
        """Yield place, rule and message (empty beyond `MAX_MESSAGES`) of every missing or broken image."""
        for place, state in enumerate(self.states):
            if state:
                yield place, STATES[state], self._messages.get(place, "")

    def small(self, place: int) -> NDArray[np.uint8]:
        """Return the small gray copy [32, 32] of an image."""
        self._small.flush()
        content = os.pread(self._small.fileno(), SIDE * SIDE, place * SIDE * SIDE)
        return np.frombuffer(content, dtype=np.uint8).reshape(SIDE, SIDE)

    def good(self) -> NDArray[np.bool_]:
        """Return a mask of the images that decoded."""
        return np.asarray(as_array(self.pixels) != 0)

    def kind_table(self) -> dict[str, int]:
        """Return the number of images by stored form (format and color mode)."""
        counts = Counter({self.kind_names[kind]: number for kind, number in Counter(self.kinds).items()})
        return {name: number for name, number in counts.most_common() if name}


def _inspect_if(name: str, root: Path | None) -> InspectedImage:
    """Inspect an image if its folder is known."""
    return InspectedImage() if root is None else inspect_image(name, root)
