"""Image names to model inputs: an index of the files of a folder, and a store of decoded images.

    name --ImageIndex--> digest of its bytes --+ preprocessing--> key --ImageStore--> pixels, or cached tower features

Images are compared by key, never by name: two names with the same bytes are one image.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import PIL
from torch import Tensor

from llava.data.encode import Encoded
from llava.data.image_negatives import damaged, split_key
from llava.errors import DataError
from llava.imaging import decode as image_files
from llava.imaging.anyres import Size
from llava.imaging.dicom.policy import DEFAULT_POLICY, DICOM_VERSION, DicomPolicy
from llava.utils.files import cache_folder, hold_lock, write_cache
from llava.utils.log import with_progress

if TYPE_CHECKING:
    from llava.data.feature_cache import FeatureCache
    from llava.processing import LlavaMedProcessor

logger = logging.getLogger(__name__)

INDEX_VERSION = f"5, Pillow {PIL.__version__}, DICOM {DICOM_VERSION}"
"""Version that a stored index must have to be used: another Pillow, or other rules, may decode other files."""


CHECKED_AGAIN = "images and rows will be checked again in the next run"
"""Consequence of a missing index or missing row check results, which share one folder."""


def hide_names(text: str, names: Iterable[str]) -> str:
    """Return a message in which every name is replaced by a mark; `show_names` restores it."""
    for name, mark in _marks(names):
        text = text.replace(name, mark)
    return text


def show_names(text: str, names: Iterable[str]) -> str:
    """Return the message that `hide_names` changed."""
    for name, mark in reversed(_marks(names)):
        text = text.replace(mark, name)
    return text


def _marks(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return names, also as quoted in messages, each with a private character; longer names first."""
    written = {form for name in names if name for form in (name, repr(name)[1:-1])}
    ordered = sorted(written, key=lambda form: (-len(form), form))
    return [(form, chr(0xE000 + place)) for place, form in enumerate(ordered)]


class FileState(NamedTuple):
    """Check result of an image file, valid while the file has these times (nanoseconds) and size (bytes)."""

    # Programs can reset mtime but not ctime, so both are compared.

    mtime: int
    ctime: int
    size: int
    digest: str
    decoded: bool
    error: str
    width: int = 0
    height: int = 0


class ImageIndex:
    """Index of the image files of a folder: digests and check results, cached by file time and size.

    Args:
        root: image folder; None for names that are complete paths.
        path: file that keeps the index between runs; None keeps it in memory only.
        dicom: rendering of DICOM files; some files may not have the requested frame.
    """

    def __init__(
        self, root: str | Path | None, path: str | Path | None = None, *, dicom: DicomPolicy = DEFAULT_POLICY
    ) -> None:
        self.root = None if root is None else Path(root)
        self.path = None if path is None else Path(path)
        self.dicom = dicom
        self.version = f"{INDEX_VERSION}, frame {dicom.frame}"
        self._files: dict[str, FileState] = {}  # by name
        self._stored: dict[str, FileState] = {}  # of earlier runs, by hash of the name
        self._seen: set[str] = set()
        self._changed = False
        self._read()

    @classmethod
    def open(cls, root: str | Path | None, *, dicom: DicomPolicy = DEFAULT_POLICY) -> ImageIndex:
        """Return the index of a folder that is stored in the user's cache."""
        name = hashlib.sha256(str(Path(root or ".").resolve()).encode()).hexdigest()[:16]
        return cls(root, cache_folder() / "images" / f"{name}.json", dicom=dicom)

    def digest(self, ref: str) -> str:
        """Return the digest of the bytes of image `ref`; the file is read on first use only.

        Raises:
            DataError: the file cannot be read, or it is known not to decode.
        """
        state = self._state(ref)
        if state.error:
            raise DataError(state.error)
        return state.digest

    def dimensions(self, ref: str) -> Size:
        """Return width and height in pixels of image `ref`; the file is decoded unless they are known.

        Raises:
            DataError: the file cannot be read or does not decode.
        """
        state = self._state(ref)
        if not state.error and not state.width:
            state = self._look(ref, decode=True)
        if state.error:
            raise DataError(state.error)
        return state.width, state.height

    def digest_or_error(self, ref: str) -> str:
        """Return the digest of image `ref`, or the message of the error that `digest` raises."""
        state = self._state(ref)
        return state.error or state.digest

    def _state(self, ref: str) -> FileState:
        return self._files[ref] if ref in self._seen else self._look(ref, decode=False)

    def verify(self, refs: Sequence[str], *, num_threads: int | None = None) -> dict[str, str]:
        """Decode every image that is not yet checked, with several threads, and save the results.

        Returns:
            The reason for each image that cannot be used.
        """
        num_threads = num_threads or min(16, 2 * (os.cpu_count() or 1))
        with ExitStack() as stack:
            if self.path is not None:
                self._wait_for_turn(stack, self.path)
            pool = stack.enter_context(ThreadPoolExecutor(num_threads))
            states = pool.map(lambda ref: self._look(ref, decode=True), refs)
            try:
                found = list(with_progress(states, title="checking images", total=len(refs), unit="image"))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # an interrupted check stops without finishing its queue
                self.save()
        return {ref: state.error for ref, state in zip(refs, found, strict=True) if state.error}

    def _wait_for_turn(self, stack: ExitStack, path: Path) -> None:
        """Wait for other processes that check this folder, and read their results."""
        try:
            stack.enter_context(hold_lock(path.with_suffix(".lock"), purpose="checking images"))
        except OSError:
            return  # the cache folder is not writable, which `save` reports
        self._read()

    def save(self) -> None:
        """Write the index to `path`, if set; a failure is logged only."""
        if self.path is None or not self._changed:
            return
        # Names of files may name a patient: the cache holds hashes of them, and messages without them.
        files = {
            self._name_hash(ref): state._replace(error=hide_names(state.error, [ref]))
            for ref, state in self._files.copy().items()
            if state.digest
        }
        content = {"version": self.version, "files": {**self._stored, **files}}
        if write_cache(self.path, json.dumps(content), lost=CHECKED_AGAIN):
            self._changed = False

    def _read(self) -> None:
        if self.path is None or not self.path.is_file():
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["version"] == self.version:
                self._stored = {name: FileState(*state) for name, state in content["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("image index %s cannot be read (%s); all images are checked again", self.path, error)

    def _look(self, ref: str, *, decode: bool) -> FileState:
        """Return the state of a file, from the index if its times and size are unchanged."""
        try:
            stat = image_files.resolve_image_path(ref, self.root).stat()
        except OSError as error:
            return self._remember(ref, FileState(0, 0, 0, "", False, f"image {ref} cannot be read: {error.strerror}"))
        except DataError as error:
            return self._remember(ref, FileState(0, 0, 0, "", False, str(error)))
        known = self._known(ref)
        current = known is not None and known[:3] == (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)
        if known is not None and current and (known.decoded or known.error or not decode):
            return self._remember(ref, known)
        try:
            data = image_files.read_image_bytes(ref, self.root)
        except DataError as problem:  # may be fixed without a change of the file (permissions), so it is not stored
            return self._remember(ref, FileState(0, 0, 0, "", False, str(problem)))
        digest, reason, dimensions = image_files.content_digest(data), "", (0, 0)
        if decode:
            try:
                dimensions = image_files.decode_image(data, dicom=self.dicom).size
            except DataError as problem:
                reason = str(problem).replace("given as bytes", ref)
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        decoded = decode and not reason
        return self._remember(ref, FileState(*times, stat.st_size, digest, decoded, reason, *dimensions))

    def _name_hash(self, ref: str) -> str:
        folder = "" if self.path is None else self.path.stem
        return hashlib.sha256(f"{folder}\0{ref}".encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _known(self, ref: str) -> FileState | None:
        known = self._files.get(ref)
        if known is None and (stored := self._stored.get(self._name_hash(ref))) is not None:
            known = stored._replace(error=show_names(stored.error, [ref]))
        return known

    def _remember(self, ref: str, state: FileState) -> FileState:
        self._changed |= bool(state.digest) and self._known(ref) != state
        self._files[ref] = state
        self._seen.add(ref)
        return state


class ImageStore:
    """Images by key: names become keys, and keys become pixels or cached tower features.

    Args:
        index: index of the image folder.
        processor: computes the pixels; its fingerprint is part of the key.
        features: tower features that replace the pixels.
        capacity: number of images kept in memory; the least recently used are dropped first.
    """

    def __init__(
        self,
        index: ImageIndex,
        processor: LlavaMedProcessor,
        *,
        features: FeatureCache | None = None,
        capacity: int = 64,
    ) -> None:
        self.index = index
        self.processor = processor
        self.features = features
        self.capacity = capacity
        self._fingerprint = processor.image_fingerprint
        self._refs: dict[str, str] = {}
        self._recent: OrderedDict[str, Tensor] = OrderedDict()

    def with_features(self, features: FeatureCache | None) -> ImageStore:
        """Return a store of the same images that gives these tower features, or pixels with None."""
        made = copy.copy(self)
        made.features = features
        return made

    def key(self, ref: str) -> str:
        """Return the key of image `ref`.

        Raises:
            DataError: the file cannot be read.
        """
        key = image_files.key_of_digest(self.index.digest(ref), self._fingerprint)
        self._refs.setdefault(key, ref)
        return key

    def sizes(self, refs: Iterable[str]) -> list[Size] | None:
        """Return width and height of each image where the number of tokens depends on them, else None.

        Raises:
            DataError: a file cannot be read or does not decode.
        """
        return [self.index.dimensions(ref) for ref in refs] if self.processor.has_variable_images else None

    def decode(self, key: str) -> Tensor:
        """Return the preprocessed image of a key: [3, H, W], or [K, 3, H, W] for K tiles; thread-safe.

        Raises:
            DataError: the key is unknown, or the file does not decode.
        """
        whole, damage = split_key(key)
        if whole not in self._refs:
            raise DataError(f"image key {key!r} is unknown; it belongs to another dataset or image folder")
        image = self.processor.open(self._refs[whole], self.index.root)
        return self.processor.preprocess(image if damage is None else damaged(image.image, *damage))

    def pixels(self, key: str) -> Tensor:
        """Return the preprocessed image of a key as `decode` does, from memory if it was used recently."""
        image = self._recent.pop(key, None)
        if image is None:
            image = self.decode(key)
        self._recent[key] = image
        while len(self._recent) > self.capacity:
            self._recent.popitem(last=False)
        return image

    def model_input(self, key: str) -> Tensor:
        """Return the cached tower features [P, Dv] of an image, or its pixels [3, H, W]."""
        if self.features is not None and key in self.features:
            return self.features.get(key)
        return self.pixels(key)

    def images_for(self, sequences: Iterable[Encoded]) -> dict[str, Tensor]:
        """Return the model input of every distinct image of the sequences, by key, in order of appearance.

        Raises:
            DataError: an image is unknown or does not decode, or only some images are in the feature cache.
        """
        keys = dict.fromkeys(key for sequence in sequences for key in sequence.images)
        found = {key: self.model_input(key) for key in keys}
        if len({tensor.dim() == 2 for tensor in found.values()}) > 1:
            raise DataError("the feature cache holds only some of the images; build it for all rows or turn it off")
        return found

    def __getstate__(self) -> Mapping[str, object]:
        """Return the state without images in memory, for worker processes."""
        return {**self.__dict__, "_recent": OrderedDict()}
