"""Streamed rows as token sequences, and their pictures by key.

    StreamedRow --sample--> Sample, picture bytes --encode--> Encoded, whose images are keys for `images_for`

The counterpart of `sft.SFTDataset` for rows that come once and are not looked up by number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded, encode
from llava.data.placing import with_places
from llava.data.records import read_default
from llava.data.streaming import MixtureStream, StreamedRow, StreamSource, picture_folder
from llava.errors import DataError
from llava.imaging import decode
from llava.samples import Origin, Sample

if TYPE_CHECKING:
    from llava.processing import LlavaMedProcessor

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
