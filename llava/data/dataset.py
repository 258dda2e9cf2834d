"""The data set of supervised training: samples to tokens, one at a time and only when asked for."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded, encode
from llava.data.image_store import ImageIndex, ImageStore
from llava.data.mixture import Shares
from llava.data.records import read_default
from llava.data.streaming import MixtureStream, StreamedRow, StreamSource, picture_folder
from llava.errors import DataError
from llava.imaging import decode
from llava.samples import Origin, Sample, name_of, with_places
from llava.utils.log import warn_once

if TYPE_CHECKING:
    from llava.data.feature_cache import FeatureCache
    from llava.processing import LlavaMedProcessor


logger = logging.getLogger(__name__)


class SFTDataset(Dataset[Encoded]):
    """Rows as token sequences: `dataset[i]` is the `Encoded` of row i, whose images are keys for `images_for`.

    Nothing is read or tokenized before it is asked for, and the data set can be pickled to worker processes.

    Args:
        samples: the rows.
        processor: turns conversations into tokens and pictures into pixels.
        image_folder: folder that image names are relative to.
        max_length: longest sequence in tokens, images included; None for no limit.
        feature_cache: tower features that `images_for` returns instead of pixels.
        index: what is known about the image files; None reads each file once more to identify it.
        capacity: decoded pictures kept in memory.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: LlavaMedProcessor,
        *,
        image_folder: str | Path | None = None,
        max_length: int | None = None,
        feature_cache: FeatureCache | None = None,
        index: ImageIndex | None = None,
        capacity: int = 64,
    ) -> None:
        self.samples: Sequence[Sample] = samples
        self.processor = processor
        self.max_length = max_length
        self.shares: Shares | None = None
        """Of a mixture: which source each row is from, and how often each is drawn."""
        self.shortened: dict[int, int] = {}
        """Row to the number of tokens cut from it, for the rows this process has encoded so far."""
        self.store = ImageStore(
            ImageIndex(image_folder) if index is None else index, processor, features=feature_cache, capacity=capacity
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Encoded:
        sample = self.samples[row]
        conversation = with_places(sample)
        try:
            keys = [self.store.key(ref) for ref in sample.images]
            sizes = self.store.sizes(sample.images)
            encoded = encode(conversation, self.processor, images=keys, sizes=sizes, max_length=self.max_length)
        except DataError as error:
            raise DataError(f"{name_of(sample)}: {error}") from error
        if encoded.num_cut:
            self.shortened[row] = encoded.num_cut
            warn_once(logger, f"rows longer than {self.max_length} tokens are shortened (images are never cut)")
        return encoded if self.shares is None else replace(encoded, source=self.shares.of_row[row])

    def lengths(self) -> list[int]:
        """Return a cheap length of every row: words of its turns, and the tokens of its images.

        Raises:
            DataError: the number of tokens depends on the images, and one does not decode.
        """
        return [
            sum(len(turn.text.split()) for turn in sample.conversation.turns)
            + sum(self.processor.count_image_tokens(len(sample.images), self.store.sizes(sample.images)))
            for sample in self.samples
        ]

    def modality_lengths(self) -> list[int]:
        """Return `lengths`, negative for rows without an image."""
        return [
            length if sample.images else -length for sample, length in zip(self.samples, self.lengths(), strict=True)
        ]

    def image_groups(self) -> list[tuple[str, ...] | None]:
        """Return what each row can share with others: its images, by name; None for a row without any."""
        return [sample.images or None for sample in self.samples]

    def image_keys(self, limit: int | None = None) -> list[str]:
        """Return the keys of the images of all rows, each once, in order of appearance; at most `limit` of them.

        Raises:
            DataError: an image file cannot be read.
        """
        refs = dict.fromkeys(ref for sample in self.samples for ref in sample.images)
        return list(dict.fromkeys(self.store.key(ref) for ref in islice(refs, limit)))

    def pixels(self, key: str) -> Tensor:
        """Return the preprocessed picture of an image key: [3, H, W], or tiles [K, 3, H, W]."""
        return self.store.decode(key)

    def use_features(self, feature_cache: FeatureCache | None) -> None:
        """Return these tower features instead of pixels from `images_for` (None: pixels again)."""
        self.store.features = feature_cache

    def images_for(self, sequences: Iterable[Encoded]) -> dict[str, Tensor]:
        """Return what the model needs of every distinct image of the sequences: its picture, or features [P, Dv].

        Raises:
            DataError: an image does not decode, or belongs to another data set.
        """
        return self.store.images_for(sequences)


NUM_PROBED = 200
"""Rows that are looked at for one with a picture and one without."""


class StreamDataset:
    """What becomes of streamed rows.

    Args:
        sources: where they come from.
        processor: turns conversations into tokens and pictures into pixels.
        max_length: longest sequence in tokens, images included; None for no limit.
        capacity: pictures kept in memory; those of one step must fit.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        processor: LlavaMedProcessor,
        *,
        max_length: int | None = None,
        capacity: int = 512,
    ) -> None:
        self.sources = tuple(sources)
        self.processor = processor
        self.max_length = max_length
        self.capacity = capacity
        self._pixels: OrderedDict[str, Tensor] = OrderedDict()
        self._probes: list[StreamedRow] = []

    def probe(self) -> None:
        """Keep a row with pictures and one without, as far as the first rows of each source have them.

        Raises:
            DataError: a source is broken, or none of its first rows can be used.
        """
        for number, source in enumerate(self.sources):
            kinds: dict[bool, StreamedRow] = {}
            problem: DataError | None = None
            for _, (found, _) in zip(range(NUM_PROBED), MixtureStream([source]).rows(), strict=False):
                row = replace(found, source=number)
                try:
                    kinds.setdefault(bool(self.encode(row).images), row)
                except DataError as error:
                    problem = problem or error
            if not kinds:
                raise problem or DataError(f"source {source.name}: no row can be used")
            self._probes += kinds.values()

    @property
    def samples(self) -> list[Sample]:
        """The probed rows: enough to know whether there are pictures, and to make idle rows."""
        return [self.sample(row)[0] for row in self._probes]

    def __getitem__(self, number: int) -> Encoded:
        return self.encode(self._probes[number])

    def __len__(self) -> int:
        return len(self._probes)

    def sample(self, found: StreamedRow) -> tuple[Sample, tuple[bytes, ...]]:
        """Return a row as a sample, and the bytes of its pictures.

        Raises:
            DataError: the row cannot be used; names shard and row.
        """
        source = self.sources[found.source]
        origin = Origin(str(found.shard), found.number)
        if isinstance(found.row, DataError):
            raise DataError(f"{origin}: {found.row}")
        try:
            sample, _ = read_default(dict(found.row.value), str(found.number))
            contents = found.row.pictures or tuple(
                decode.read_bytes(ref, picture_folder(source.name, source.images)) for ref in sample.images
            )
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        named = {"source": source.name, **({"licence": source.licence} if source.licence else {})}
        refs = sample.images or tuple(f"picture {number}" for number in range(len(contents)))
        return replace(sample, images=refs, meta={**named, **sample.meta}, origin=origin), contents

    def encode(self, found: StreamedRow) -> Encoded:
        """Return a row's sequence; its pictures are decoded and kept for `images_for`.

        Raises:
            DataError: the row cannot be used or has no trained token; names shard and row.
        """
        sample, contents = self.sample(found)
        origin = sample.origin
        try:
            conversation = with_places(replace(sample, origin=None))
            keys, sizes = [], []
            for content in contents:
                keys.append(decode.image_key(content, self.processor.image_fingerprint))
                sizes.append(self._keep(keys[-1], content))
            shown = sizes if self.processor.has_variable_images else None
            encoded = encode(conversation, self.processor, images=keys, sizes=shown, max_length=self.max_length)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        if all(label == IGNORE_INDEX for label in encoded.labels):
            raise DataError(f"{origin}: no token is trained (an empty answer, or all of it was cut)")
        return replace(encoded, source=found.source)

    def _keep(self, key: str, content: bytes) -> tuple[int, int]:
        """Decode a picture and keep its pixels; returns its width and height."""
        picture = self.processor.open(content)
        if key not in self._pixels:
            self._pixels[key] = self.processor.picture(picture)
        self._pixels.move_to_end(key)
        while len(self._pixels) > self.capacity:
            self._pixels.popitem(last=False)
        return picture.size

    def images_for(self, sequences: Iterable[Encoded]) -> Mapping[str, Tensor]:
        """Return the pixels of every distinct image of sequences that were encoded just before.

        Raises:
            DataError: a step has more pictures than are kept.
        """
        keys = dict.fromkeys(key for sequence in sequences for key in sequence.images)
        gone = [key for key in keys if key not in self._pixels]
        if gone:
            raise DataError(f"a step of streamed rows has more than {self.capacity} pictures; use smaller steps")
        return {key: self._pixels[key] for key in keys}
