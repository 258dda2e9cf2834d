"""Streams: every row once per pass over all readers, weights, and resuming from any position."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.shards import StreamRow
from llava.data.streaming import MixturePosition, MixtureStream, StreamSource
from llava.errors import ConfigError, DataError


def write_source(folder: Path, name: str, sizes: list[int], weight: float = 1.0) -> StreamSource:
    shards = []
    for shard, size in enumerate(sizes):
        path = folder / f"{name}-{shard}.jsonl"
        path.write_text("".join(json.dumps({"id": f"{name}-{shard}-{row}"}) + "\n" for row in range(size)))
        shards.append(path)
    return StreamSource(name, tuple(shards), weight)


def ids(stream: MixtureStream, count: int, position: MixturePosition | None = None) -> list[str]:
    found = []
    for row, _ in islice(stream.rows(position), count):
        assert isinstance(row.row, StreamRow)
        found.append(str(row.row.value["id"]))
    return found


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) >= 3),
    num_readers=st.integers(1, 3),
    window=st.integers(1, 7),
)
def test_every_row_once_a_pass(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], num_readers: int, window: int
) -> None:
    source = write_source(tmp_path_factory.mktemp("rows"), "a", sizes)
    found: Counter[str] = Counter()
    for reader in range(num_readers):
        stream = MixtureStream([source], reader=reader, num_readers=num_readers, window=window)
        own = 0
        try:
            for row, position in stream.rows():
                if position.sources[0].turn > 0:
                    break
                assert isinstance(row.row, StreamRow)
                found[str(row.row.value["id"])] += 1
                own += 1
        except DataError as error:
            assert "no row for reader" in str(error) and not own
    assert set(found.values()) == {1} and len(found) == sum(sizes)


@given(done=st.integers(0, 40), window=st.integers(1, 6), num_readers=st.integers(1, 2))
def test_going_on_from_any_position(
    tmp_path_factory: pytest.TempPathFactory, done: int, window: int, num_readers: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    sources = [write_source(folder, "a", [4, 5], 2.0), write_source(folder, "b", [3])]
    stream = MixtureStream(sources, reader=num_readers - 1, num_readers=num_readers, window=window, seed=5)
    whole = list(islice(stream.rows(), done + 20))
    position = whole[done - 1][1] if done else MixturePosition.start(2)
    kept = MixturePosition.from_json(json.loads(json.dumps(asdict(position))))
    assert [row for row, _ in islice(stream.rows(kept), 20)] == [row for row, _ in whole[done:]]


def test_weights_are_kept_at_every_moment(tmp_path: Path) -> None:
    sources = [write_source(tmp_path, "a", [7], 3.0), write_source(tmp_path, "b", [50], 1.0)]
    found = [name.partition("-")[0] for name in ids(MixtureStream(sources), 40)]
    assert Counter(found) == {"a": 30, "b": 10}
    assert all(Counter(found[start : start + 4])["b"] == 1 for start in range(0, 40, 4))


def test_order_depends_on_the_seed_and_changes_from_pass_to_pass(tmp_path: Path) -> None:
    source = write_source(tmp_path, "a", [10, 10])
    first, again, other = (ids(MixtureStream([source], seed=seed), 40) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first[:20]) == sorted(first[20:]) and first[:20] != first[20:]


def test_bad_rows_keep_their_place_and_broken_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "0"}\nbroken\n')
    stream = MixtureStream([StreamSource("a", (tmp_path / "a.jsonl",))])
    rows = {row.number: row.row for row, _ in islice(stream.rows(), 2)}
    assert isinstance(rows[0], StreamRow) and isinstance(rows[1], DataError)
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        next(MixtureStream([StreamSource("a", (tmp_path / "none.jsonl",))]).rows())
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="has no row for reader 0 of 1"):
        next(MixtureStream([StreamSource("a", (tmp_path / "empty.jsonl",))]).rows())
    with pytest.raises(ConfigError, match="at least one shard"):
        MixtureStream([StreamSource("a", ())])
    with pytest.raises(DataError, match="not the position of a stream"):
        MixturePosition.from_json({"sources": 1})
