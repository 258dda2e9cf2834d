"""The data set of supervised training: samples to tokens, one at a time and only when asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset

from llava.data.encode import Encoded, encode
from llava.data.image_store import ImageIndex, ImageStore
from llava.data.mixture import Shares
from llava.data.placing import with_places
from llava.errors import DataError
from llava.samples import Sample, name_of
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
