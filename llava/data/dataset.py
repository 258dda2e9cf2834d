"""Datasets for supervised fine-tuning: map-style or streamed; rows are tokenized lazily.

Sample --encode--> Encoded, whose images are keys --images_for--> pixels or tower features by key
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypedDict, TypeVar, Unpack

from torch import Tensor
from torch.utils.data import Dataset

from llava.data.encode import Encoded, encode, num_learned
from llava.data.image_store import ImageIndex, ImageStore
from llava.data.mixture import Shares, meta_with_source
from llava.data.records import read_default
from llava.data.self_questioning import QuestionDraws
from llava.data.streaming import MixtureStream, StreamedRow, StreamSource, image_folder_of
from llava.errors import DataError, EmptyAnswerError
from llava.imaging import decode
from llava.samples import Conversation, Origin, Sample, rows_label, sample_label, with_placeholders
from llava.utils.log import warn_once

if TYPE_CHECKING:
    from llava.data.feature_cache import FeatureCache
    from llava.processing import LlavaMedProcessor


logger = logging.getLogger(__name__)


Row_co = TypeVar("Row_co", covariant=True)


class RowSettings(TypedDict, total=False):
    """Keyword arguments of `RowDataset`."""

    image_folder: str | Path | None
    max_length: int | None
    image_counts_as_one: bool
    feature_cache: FeatureCache | None
    index: ImageIndex | None
    capacity: int


class RowDataset(Dataset[Row_co]):
    """Map-style dataset of rows with images, as samplers, feature caches and collator need it.

    Images are read and rows tokenized on access only, and the dataset can be pickled to worker processes.

    Args:
        samples: one sample of each row.
        processor: turns conversations into tokens and images into pixels.
        image_folder: folder that image names are relative to.
        max_length: longest sequence in tokens, images included; None for no limit.
        image_counts_as_one: count each image as one token of `max_length`, see `encode`.
        feature_cache: tower features that `images_for` returns instead of pixels.
        index: index of the image files; None reads each file once more to compute its digest.
        capacity: number of decoded images kept in memory.

    Attributes:
        store: images of the rows by key.
        shares: for a mixture, the source of each row, and how often the rows of each are drawn.
    """

    shares: Shares | None = None

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
        self.samples = samples
        self.processor = processor
        self.max_length = max_length
        self.image_counts_as_one = image_counts_as_one
        self.store = ImageStore(
            ImageIndex(image_folder) if index is None else index, processor, features=feature_cache, capacity=capacity
        )

    def in_epoch(self, row: int, epoch: int) -> Row_co:
        """Return a row as trained in an epoch; most rows are the same in every epoch."""
        return self[row]

    def encode(self, conversation: Conversation, images: Sequence[str]) -> Encoded:
        """Return the sequence of a conversation about images of the rows.

        Raises:
            DataError: an image cannot be read, or the conversation cannot be encoded.
        """
        return encode(
            conversation,
            self.processor,
            images=[self.store.key(ref) for ref in images],
            sizes=self.store.sizes(images),
            max_length=self.max_length,
            image_counts_as_one=self.image_counts_as_one,
        )

    def __len__(self) -> int:
        return len(self.samples)

    def label_rows(self, rows: Sequence[int]) -> str:
        """Return file, row numbers and ids of rows, for messages."""
        return rows_label([self.samples[row] for row in rows])

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

    def with_features(self, feature_cache: FeatureCache | None) -> Self:
        """Return a copy of the dataset whose `images_for` returns tower features, or pixels for None."""
        made = copy.copy(self)
        made.store = self.store.with_features(feature_cache)
        return made

    def images_for(self, sequences: Iterable[Encoded]) -> dict[str, Tensor]:
        """Return the model input of each distinct image of the sequences, by key: pixels or features [P, Dv].

        Raises:
            DataError: an image does not decode, or belongs to another dataset.
        """
        return self.store.images_for(sequences)


class SFTDataset(RowDataset[Encoded]):
    """Map-style dataset: `dataset[i]` is the `Encoded` of row i, whose images are keys for `images_for`.

    Args:
        samples: rows of the dataset.
        processor: turns conversations into tokens and images into pixels.
        shares: for a mixture, the source of each row, and how often the rows of each are drawn.
        asking: which later questions are trained; None for none but those that the rows name.
        settings: see `RowDataset`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: LlavaMedProcessor,
        *,
        shares: Shares | None = None,
        asking: QuestionDraws | None = None,
        **settings: Unpack[RowSettings],
    ) -> None:
        super().__init__(samples, processor, **settings)
        self.shares = shares
        self.asking = asking
        self.shortened: dict[int, int] = {}
        """Number of tokens cut from each row, for the rows that this process has encoded so far."""

    def __getitem__(self, row: int) -> Encoded:
        return self._encoded(row, 0)

    def in_epoch(self, row: int, epoch: int) -> Encoded:
        """Return a row with the questions that are drawn in an epoch."""
        return self[row] if self.asking is None else self._encoded(row, epoch)

    def _encoded(self, row: int, epoch: int) -> Encoded:
        sample = self.samples[row]
        conversation = with_placeholders(sample)
        if self.asking is not None:
            has_image = bool(sample.images)
            conversation = self.asking.apply(conversation, has_image=has_image, place=f"{epoch}/{row}")
        try:
            encoded = self.encode(conversation, sample.images)
        except DataError as error:
            raise DataError(f"{sample_label(sample)}: {error}") from error
        if encoded.num_cut:
            self.shortened[row] = encoded.num_cut
            warn_once(logger, f"rows longer than {self.max_length} tokens are shortened (images are never cut)")
        return encoded if self.shares is None else replace(encoded, source=self.shares.of_row[row])


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
        asking: which later questions are trained; None for none but those that the rows name.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        processor: LlavaMedProcessor,
        *,
        max_length: int | None = None,
        image_counts_as_one: bool = False,
        capacity: int = 512,
        asking: QuestionDraws | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.processor = processor
        self.max_length = max_length
        self.image_counts_as_one = image_counts_as_one
        self.capacity = capacity
        self.asking = asking
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

    def label_rows(self, rows: Sequence[int]) -> str:
        """Return stream row numbers for messages; each reader counts the rows that it has read."""
        return f"rows {', '.join(map(str, rows))} of what its readers have read" if rows else ""

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
            inside = [f"image {number}" for number in range(len(found.row.images))]
            value = {**found.row.value, "image": inside} if inside else dict(found.row.value)
            sample, _ = read_default(value, str(found.number))
            contents = found.row.images or tuple(
                decode.read_image_bytes(ref, image_folder_of(source.name, source.images)) for ref in sample.images
            )
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        meta = meta_with_source(sample.meta, source.name, source.license)
        return replace(sample, meta=meta, origin=origin), contents

    def encode(self, found: StreamedRow) -> Encoded:
        """Return the sequence of a row; its images are decoded and kept for `images_for`.

        Raises:
            EmptyAnswerError: the row has empty answers only, which are not trained.
            DataError: the row cannot be used or has no trained token; the message names shard and row.
        """
        sample, contents = self.sample(found)
        origin = sample.origin
        try:
            conversation = with_placeholders(replace(sample, origin=None))
            if self.asking is not None:
                place = f"{found.turn}/{found.source}/{found.shard.name}/{found.number}"
                conversation = self.asking.apply(conversation, has_image=bool(contents), place=place)
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
        if not num_learned(encoded, conversation):
            if conversation.has_only_empty_answers and not self.processor.template.trains_empty:
                raise EmptyAnswerError(
                    f"{origin}: the answers are empty; expected at least one with text (--compat empty_answers trains "
                    "empty ones)"
                )
            raise DataError(f"{origin}: no token is trained (no answer, or it was cut completely)")
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
