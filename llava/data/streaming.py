"""Endless, resumable streams of rows from sources that do not fit in memory, mixed by weight.

    shards of a source --passes, shuffled--> windows of rows, shuffled --weights--> StreamedRow, StreamedRow, ...

Each reader reads its own share: whole shards if there are enough, else every n-th row of each shard. The order depends
only on the seed, the pass and the window, and the next source only on the weights. A position is therefore a few
numbers, and resuming from one rereads at most one window per source.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.shards import StreamRow, rows_in
from llava.errors import ConfigError, DataError

WINDOW = 1000
"""Number of rows that are held and shuffled at once."""

MAX_EMPTY_PASSES = 20
"""After this number of passes with only empty shards a reader is considered to have no rows."""


@dataclass(frozen=True, slots=True)
class StreamSource:
    """Source of shards in a streaming mixture.

    Attributes:
        name: name in metrics.
        shards: files in order.
        weight: weight in the mixture; rows are drawn in proportion to the weights.
        images: folder of the images that rows name; None if rows must not name image files.
        license: license of rows that do not name one.
    """

    name: str
    shards: tuple[Path, ...]
    weight: float = 1.0
    images: Path | None = None
    license: str = ""


def image_folder_of(source: str, images: Path | None) -> Path:
    """Return the folder of the images that rows of a source name.

    Raises:
        DataError: the source has no image folder.
    """
    # Rows are untrusted: without a folder they could name any file of the machine.
    if images is None:
        raise DataError(
            f"the row names an image, but source {source} has no `images`; write `images: FOLDER` there "
            "(`images: /` lets rows name any file of this machine)"
        )
    return images


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """Row with its source, shard, number and pass; `row` is the error of a row that cannot be used."""

    source: int
    shard: Path
    number: int
    row: StreamRow | DataError
    turn: int = 0


@dataclass(slots=True)
class Position:
    """Start of a source's next window, and the number of its rows that were already yielded.

    Attributes:
        turn: number of passes over the shards before this one.
        shard: index of the shard in the order of this pass.
        row: number of the next row in the shard.
        window: number of windows before this one.
        given: number of rows of the window that were yielded.
    """

    turn: int = 0
    shard: int = 0
    row: int = 0
    window: int = 0
    given: int = 0


@dataclass(slots=True)
class MixturePosition:
    """Positions of all sources, and the number of rows that each has yielded."""

    sources: list[Position]
    counts: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, num_sources: int) -> MixturePosition:
        """Return the position before the first row."""
        return cls([Position() for _ in range(num_sources)], [0] * num_sources)

    @classmethod
    def from_json(cls, value: Any) -> MixturePosition:
        """Return the position of a JSON object made with `dataclasses.asdict`.

        Raises:
            DataError: the value is not a position.
        """
        try:
            return cls([Position(**part) for part in value["sources"]], [int(count) for count in value["counts"]])
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"not the position of a stream: {type(error).__name__}: {error}") from error


class _SourceStream:
    """Endless rows of one source, limited to the share of one reader."""

    def __init__(self, source: StreamSource, number: int, share: tuple[int, int], seed: int, window: int) -> None:
        self.source, self.number, self.seed, self.window = source, number, seed, window
        self.index, self.count = share
        self.by_shard = len(source.shards) >= self.count

    def rows(self, position: Position) -> Iterator[tuple[StreamedRow, Position]]:
        """Yield rows, each with the position after it."""
        turn, shard, row, window, given = (
            position.turn, position.shard, position.row, position.window, position.given
        )  # fmt: skip
        last_turn = turn
        while True:
            held, (next_turn, next_shard, next_row) = self._take(turn, shard, row)
            last_turn = next_turn if held else last_turn
            if next_turn - last_turn > MAX_EMPTY_PASSES:
                raise DataError(
                    f"source {self.source.name} has no row for reader {self.index} of {self.count}; use fewer ranks "
                    "or workers, or add rows"
                )
            self._random("window", window).shuffle(held)
            for done, found in enumerate(held[given:], start=given + 1):
                yield found, Position(turn, shard, row, window, done)
            turn, shard, row, window, given = next_turn, next_shard, next_row, window + 1, 0

    def _take(self, turn: int, shard: int, row: int) -> tuple[list[StreamedRow], tuple[int, int, int]]:
        """Return one window of rows from a place on (it ends with the pass), and the place after it."""
        held: list[StreamedRow] = []
        order = self._shards(turn)
        while shard < len(order):
            for number, found in rows_in(order[shard], row):
                if len(held) == self.window:
                    return held, (turn, shard, number)
                if self.by_shard or number % self.count == self.index:
                    held.append(StreamedRow(self.number, order[shard], number, found, turn))
            shard, row = shard + 1, 0
        return held, (turn + 1, 0, 0)

    def _shards(self, turn: int) -> list[Path]:
        """Return the shards of this reader in the order of a pass."""
        order = list(self.source.shards)
        self._random("pass", turn).shuffle(order)
        return order[self.index :: self.count] if self.by_shard else order

    def _random(self, what: str, number: int) -> random.Random:
        reader = self.index if what == "window" else "all"  # all readers need the same order of shards
        return random.Random(f"{self.seed}/{self.number}/{what}/{number}/{reader}")


class MixtureStream:
    """Endless rows of several sources in proportion to their weights.

    Args:
        sources: at least one, each with at least one shard.
        reader: index of this reader.
        num_readers: number of readers that share the rows (ranks times workers).
        seed: seed of the order.
        window: number of rows that are held and shuffled at once, per source.

    Raises:
        ConfigError: sources or shards are missing, or a count is out of range.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        *,
        reader: int = 0,
        num_readers: int = 1,
        seed: int = 0,
        window: int = WINDOW,
    ) -> None:
        if not sources or not all(source.shards for source in sources):
            raise ConfigError("a stream needs at least one source, and each source at least one shard")
        if not 0 <= reader < num_readers or window < 1:
            raise ConfigError(
                f"invalid reader {reader} of {num_readers} with a window of {window} rows; expected a reader from 0 to "
                f"{num_readers - 1} and a window of at least 1"
            )
        self.sources = tuple(sources)
        self._streams = [
            _SourceStream(source, number, (reader, num_readers), seed, window) for number, source in enumerate(sources)
        ]

    def rows(self, position: MixturePosition | None = None) -> Iterator[tuple[StreamedRow, MixturePosition]]:
        """Yield rows from a position on, each with the position after it.

        The next row is from the source that has yielded the least relative to its weight.

        Raises:
            DataError: a shard is missing or damaged, or a source has no row for this reader.
        """
        position = position or MixturePosition.start(len(self.sources))
        places, counts = list(position.sources), list(position.counts)
        streams = [stream.rows(place) for stream, place in zip(self._streams, places, strict=True)]
        while True:
            chosen = min(range(len(counts)), key=lambda n: ((counts[n] + 1) / self.sources[n].weight, n))
            row, places[chosen] = next(streams[chosen])
            counts[chosen] += 1
            yield row, MixturePosition(list(places), list(counts))
