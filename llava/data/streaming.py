"""Endless rows of one rank out of sources that do not fit in memory, from any position on.

    shards of a source --passes, shuffled--> windows of rows, shuffled --weights--> StreamedRow, StreamedRow, ...

Every rank reads its own share: its shards where there are enough of them, else every so manieth row of each. Nothing is
random but what the seed, the pass and the window say, and which source comes next follows from the weights alone; so a
position is a few numbers, and going on from one reads at most one window of a source again.
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
"""Rows that are held and shuffled at once."""

MAX_EMPTY_PASSES = 20
"""A reader that met only empty shards in so many passes has no rows."""


@dataclass(frozen=True, slots=True)
class StreamSource:
    """A source of shards.

    Attributes:
        name: what metrics call it.
        shards: its files, in order.
        weight: of its rows in the mixture: rows come in proportion to the weights.
        images: folder of the images that rows name; None where rows name no files.
        licence: of rows that name none themselves.
    """

    name: str
    shards: tuple[Path, ...]
    weight: float = 1.0
    images: Path | None = None
    license: str = ""


def image_folder_of(source: str, images: Path | None) -> Path:
    """Return the folder of the images that rows of a source name.

    Raises:
        DataError: the source has none: a row, which may come from anybody, must not choose among all files.
    """
    if images is None:
        raise DataError(
            f"the row names an image, but source {source} has no `images`; write `images: FOLDER` there "
            "(`images: /` lets rows name any file of this machine)"
        )
    return images


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A row and where it came from; a row that cannot be used holds the error."""

    source: int
    shard: Path
    number: int
    row: StreamRow | DataError


@dataclass(slots=True)
class Position:
    """Where a source's next window begins, and how many rows of it were given out.

    Attributes:
        turn: passes over the shards before this one.
        shard: place of the shard in this pass's order.
        row: number of the next row in it.
        window: windows before this one.
        given: rows of the window that were given out.
    """

    turn: int = 0
    shard: int = 0
    row: int = 0
    window: int = 0
    given: int = 0


@dataclass(slots=True)
class MixturePosition:
    """Positions of all sources, and how many rows each has given."""

    sources: list[Position]
    counts: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, num_sources: int) -> MixturePosition:
        """Return the beginning."""
        return cls([Position() for _ in range(num_sources)], [0] * num_sources)

    @classmethod
    def from_json(cls, value: Any) -> MixturePosition:
        """Return what `dataclasses.asdict` made a table of.

        Raises:
            DataError: it is something else.
        """
        try:
            return cls([Position(**part) for part in value["sources"]], [int(count) for count in value["counts"]])
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"no position of a stream: {type(error).__name__}: {error}") from error


class _SourceStream:
    """The endless rows of one source for one share of the readers."""

    def __init__(self, source: StreamSource, number: int, share: tuple[int, int], seed: int, window: int) -> None:
        self.source, self.number, self.seed, self.window = source, number, seed, window
        self.index, self.count = share
        self.by_shard = len(source.shards) >= self.count

    def rows(self, position: Position) -> Iterator[tuple[StreamedRow, Position]]:
        """Yield rows, each with the position behind it."""
        turn, shard, row, window, given = (
            position.turn, position.shard, position.row, position.window, position.given
        )  # fmt: skip
        last_turn = turn
        while True:
            held, (next_turn, next_shard, next_row) = self._take(turn, shard, row)
            last_turn = next_turn if held else last_turn
            if next_turn - last_turn > MAX_EMPTY_PASSES:
                raise DataError(f"source {self.source.name}: there is no row for reader {self.index} of {self.count}")
            self._random("window", window).shuffle(held)
            for done, found in enumerate(held[given:], start=given + 1):
                yield found, Position(turn, shard, row, window, done)
            turn, shard, row, window, given = next_turn, next_shard, next_row, window + 1, 0

    def _take(self, turn: int, shard: int, row: int) -> tuple[list[StreamedRow], tuple[int, int, int]]:
        """One window of rows from a place on (it ends with the pass), and the place behind it."""
        held: list[StreamedRow] = []
        order = self._shards(turn)
        while shard < len(order):
            for number, found in rows_in(order[shard], row):
                if len(held) == self.window:
                    return held, (turn, shard, number)
                if self.by_shard or number % self.count == self.index:
                    held.append(StreamedRow(self.number, order[shard], number, found))
            shard, row = shard + 1, 0
        return held, (turn + 1, 0, 0)

    def _shards(self, turn: int) -> list[Path]:
        """This reader's shards in the order of a pass."""
        order = list(self.source.shards)
        self._random("pass", turn).shuffle(order)
        return order[self.index :: self.count] if self.by_shard else order

    def _random(self, what: str, number: int) -> random.Random:
        reader = self.index if what == "window" else "all"  # all readers must agree on the order of the shards
        return random.Random(f"{self.seed}/{self.number}/{what}/{number}/{reader}")


class MixtureStream:
    """Endless rows of several sources in proportion to their weights.

    Args:
        sources: at least one, each with at least one shard.
        reader: which of the readers this is (ranks times workers).
        num_readers: how many share the rows.
        seed: of the order.
        window: rows that are held and shuffled at once, for each source.

    Raises:
        ConfigError: there is no source or no shard, or a count is out of range.
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
            raise ConfigError(f"reader {reader} of {num_readers} with windows of {window} rows cannot be")
        self.sources = tuple(sources)
        self._streams = [
            _SourceStream(source, number, (reader, num_readers), seed, window) for number, source in enumerate(sources)
        ]

    def rows(self, position: MixturePosition | None = None) -> Iterator[tuple[StreamedRow, MixturePosition]]:
        """Yield rows from a position on, each with the position behind it.

        The next row is of the source that is furthest behind its weight.

        Raises:
            DataError: a shard is missing or broken, or a source has no row for this reader.
        """
        position = position or MixturePosition.start(len(self.sources))
        places, counts = list(position.sources), list(position.counts)
        streams = [stream.rows(place) for stream, place in zip(self._streams, places, strict=True)]
        while True:
            chosen = min(range(len(counts)), key=lambda n: ((counts[n] + 1) / self.sources[n].weight, n))
            row, places[chosen] = next(streams[chosen])
            counts[chosen] += 1
            yield row, MixturePosition(list(places), list(counts))
