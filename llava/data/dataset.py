"""Datasets for supervised fine-tuning: map-style or streamed; rows are tokenized lazily.

Sample --encode--> Encoded, whose images are keys --images_for--> pixels or tower features by key
"""

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
from llava.data.mixture import Shares, meta_with_source
from llava.data.records import read_default
from llava.data.streaming import MixtureStream, StreamedRow, StreamSource, image_folder_of
from llava.errors import DataError
from llava.imaging import decode
from llava.samples import Origin, Sample, sample_label, with_placeholders
from llava.utils.log import warn_once

if TYPE_CHECKING:
    from llava.data.feature_cache import FeatureCache
    from llava.processing import LlavaMedProcessor


logger = logging.getLogger(__name__)


class SFTDataset(Dataset[Encoded]):
    """Map-style dataset: `dataset[i]` is the `Encoded` of row i, whose images are keys for `images_for`.

    Images are read and rows tokenized on access only, and the dataset can be pickled to worker processes.

    Args:
        samples: rows of the dataset.
        processor: turns conversations into tokens and images into pixels.
        image_folder: folder that image names are relative to.
        max_length: longest sequence in tokens, images included; None for no limit.
        image_counts_as_one: count each image as one token of `max_length`, see `encode`.
        feature_cache: tower features that `images_for` returns instead of pixels.
        index: index of the image files; None reads each file once more to compute its digest.
        capacity: number of decoded images kept in memory.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: LlavaMedProcessor,
        *,
        image_folder: str | Path | None = None,
        max_length: int | None = None,
        image_counts_as_one: bool = False,
        feature_cache: FeatureCache | None = None,
        index: ImageIndex | None = None,
        capacity: int = 64,
    ) -> None:
        self.samples: Sequence[Sample] = samples
        self.processor = processor
        self.max_length = max_length
        self.image_counts_as_one = image_counts_as_one
        self.shares: Shares | None = None
        """For a mixture: the source of each row, and how often the rows of each are drawn."""
        self.shortened: dict[int, int] = {}
        """Number of tokens cut from each row, for the rows that this process has encoded so far."""
        self.store = ImageStore(
            ImageIndex(image_folder) if index is None else index, processor, features=feature_cache, capacity=capacity
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Encoded:
        sample = self.samples[row]
        conversation = with_placeholders(sample)
        try:
            keys = [self.store.key(ref) for ref in sample.images]
            sizes = self.store.sizes(sample.images)
            encoded = encode(
                conversation,
                self.processor,
                images=keys,
                sizes=sizes,
                max_length=self.max_length,
                image_counts_as_one=self.image_counts_as_one,
            )
        except DataError as error:
            raise DataError(f"{sample_label(sample)}: {error}") from error
        if encoded.num_cut:
            self.shortened[row] = encoded.num_cut
            warn_once(logger, f"rows longer than {self.max_length} tokens are shortened (images are never cut)")
        return encoded if self.shares is None else replace(encoded, source=self.shares.of_row[row])

    def lengths(self) -> list[int]:
        """Return an approximate length of every row: the words of its turns plus the tokens of its images.

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
        """Return the image names of each row, which rows may share; None for a row without images."""
        return [sample.images or None for sample in self.samples]

    def image_keys(self, limit: int | None = None) -> list[str]:
        """Return the distinct image keys of all rows, in order of appearance; at most `limit` of them.

        Raises:
            DataError: an image file cannot be read.
        """
        refs = dict.fromkeys(ref for sample in self.samples for ref in sample.images)
        return list(dict.fromkeys(self.store.key(ref) for ref in islice(refs, limit)))

    def pixels(self, key: str) -> Tensor:
        """Return the preprocessed image of an image key: [3, H, W], or tiles [K, 3, H, W]."""
        return self.store.decode(key)

    def use_features(self, feature_cache: FeatureCache | None) -> None:
        """Make `images_for` return these tower features instead of pixels; None returns to pixels."""
        self.store.features = feature_cache

    def images_for(self, sequences: Iterable[Encoded]) -> dict[str, Tensor]:
        """Return the model input of each distinct image of the sequences, by key: pixels or features [P, Dv].

        Raises:
            DataError: an image does not decode, or belongs to another dataset.
        """
        return self.store.images_for(sequences)


NUM_PROBED = 200
"""Number of rows searched for one with an image and one without."""


class StreamDataset:
    """Encoder of streamed rows; `dataset[i]` gives the few rows that `probe` kept.

    Args:
        sources: sources of the stream.
        processor: turns conversations into tokens and images into pixels.
        max_length: longest sequence in tokens, images included; None for no limit.
        image_counts_as_one: count each image as one token of `max_length`, see `encode`.
        capacity: number of images kept in memory; those of one step must fit.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        processor: LlavaMedProcessor,
        *,
        max_length: int | None = None,
        image_counts_as_one: bool = False,
        capacity: int = 512,
    ) -> None:
        self.sources = tuple(sources)
        self.processor = processor
        self.max_length = max_length
        self.image_counts_as_one = image_counts_as_one
        self.capacity = capacity
        self._pixels: OrderedDict[str, Tensor] = OrderedDict()
        self._probes: list[StreamedRow] = []

    def probe(self) -> None:
        """Keep one row with images and one without from the first `NUM_PROBED` rows of each source.

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
        """Return the probed rows, which show whether rows have images and serve as idle rows."""
        return [self.sample(row)[0] for row in self._probes]

    def __getitem__(self, number: int) -> Encoded:
        return self.encode(self._probes[number])

    def __len__(self) -> int:
        return len(self._probes)

    def sample(self, found: StreamedRow) -> tuple[Sample, tuple[bytes, ...]]:
        """Return a row as a sample, and the bytes of its images.

        Raises:
            DataError: the row cannot be used; the message names shard and row.
        """
        source = self.sources[found.source]
        origin = Origin(str(found.shard), found.number)
        if isinstance(found.row, DataError):
            raise DataError(f"{origin}: {found.row}")
        try:
            sample, _ = read_default(dict(found.row.value), str(found.number))
            contents = found.row.images or tuple(
                decode.read_image_bytes(ref, image_folder_of(source.name, source.images)) for ref in sample.images
            )
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        refs = sample.images or tuple(f"image {number}" for number in range(len(contents)))
        return replace(
            sample, images=refs, meta=meta_with_source(sample.meta, source.name, source.license), origin=origin
        ), contents

    def encode(self, found: StreamedRow) -> Encoded:
        """Return the sequence of a row; its images are decoded and kept for `images_for`.

        Raises:
            DataError: the row cannot be used or has no trained token; the message names shard and row.
        """
        sample, contents = self.sample(found)
        origin = sample.origin
        try:
            conversation = with_placeholders(replace(sample, origin=None))
            keys, sizes = [], []
            for content in contents:
                keys.append(decode.image_key(content, self.processor.image_fingerprint))
                sizes.append(self._keep(keys[-1], content))
            shown = sizes if self.processor.has_variable_images else None
            encoded = encode(
                conversation,
                self.processor,
                images=keys,
                sizes=shown,
                max_length=self.max_length,
                image_counts_as_one=self.image_counts_as_one,
            )
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        if all(label == IGNORE_INDEX for label in encoded.labels):
            raise DataError(f"{origin}: no token is trained (the answer is empty or was cut completely)")
        return replace(encoded, source=found.source)

    def _keep(self, key: str, content: bytes) -> tuple[int, int]:
        """Decode an image and keep its pixels; return its width and height."""
        image = self.processor.open(content)
        if key not in self._pixels:
            self._pixels[key] = self.processor.preprocess(image)
        self._pixels.move_to_end(key)
        while len(self._pixels) > self.capacity:
            self._pixels.popitem(last=False)
        return image.size

    def images_for(self, sequences: Iterable[Encoded]) -> Mapping[str, Tensor]:
        """Return the pixels of every distinct image of the sequences encoded last, by key.

        Raises:
            DataError: a step has more images than are kept.
        """
        keys = dict.fromkeys(key for sequence in sequences for key in sequence.images)
        if any(key not in self._pixels for key in keys):
            raise DataError(f"a step of streamed rows has more than {self.capacity} images; use smaller steps")
        return {key: self._pixels[key] for key in keys}
