"""Attention over stems and slots against plain attention over each sequence, with joins and leaves."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.generation import step_index
from llava.generation.kv_cache import CapturedRow, Path, SlotCache, divided_paths
from llava.generation.step_index import Stem, StepIndex

QUERY_HEADS, HEADS, WIDTH, LAYERS = 4, 2, 8, 2


class Plain:
    """Sequence with its keys and values [H, n, D] of every layer."""

    def __init__(self, row: CapturedRow, path: Path) -> None:
        places = torch.cat([path.shared, path.rest])
        self.states = [[states[0][:, places] for states in kept] for kept in (row.keys, row.values)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        for part, new in enumerate((key, value)):
            self.states[part][layer] = torch.cat([self.states[part][layer], new], dim=1)
        keys, values = (kept[layer][:, -window if window else 0 :] for kept in self.states)
        repeats = QUERY_HEADS // HEADS
        return F.scaled_dot_product_attention(
            query, keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0)
        )


def make_row(generator: torch.Generator, draw: random.Random) -> tuple[CapturedRow, tuple[Path, ...]]:
    """Return a row of two trees: a chain, and one whose branches share a root."""
    lengths = [draw.choice([1, 4, 40]), draw.choice([3, 50]), *(draw.choice([1, 6, 33]) for _ in range(3))]
    segment_ids = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    captured = CapturedRow()
    for layer in range(LAYERS):
        states = torch.randn(2, 1, HEADS, len(segment_ids), WIDTH, generator=generator)
        captured.update(states[0], states[1], layer)
    runs = [(segment_ids == node).nonzero()[:, 0] for node in range(5)]
    paths = [runs[0], *(torch.cat([runs[1], run]) for run in runs[2:])]
    return captured, divided_paths(paths, segment_ids)


def step(cache: SlotCache, expected: list[Plain], generator: torch.Generator, window: int | None) -> None:
    positions = cache.begin_step()
    assert positions[:, 0].tolist() == [plain.states[0][0].shape[1] for plain in expected]
    for layer in range(LAYERS):
        query = torch.randn(len(expected), QUERY_HEADS, 1, WIDTH, generator=generator)
        key, value = torch.randn(2, len(expected), HEADS, 1, WIDTH, generator=generator)
        found = cache.attend(layer, query, key, value, scaling=None, window=window)
        for slot, plain in enumerate(expected):
            wanted = plain.attend(layer, query[slot], key[slot], value[slot], window)
            assert torch.allclose(found[slot, 0], wanted[:, 0], atol=1e-5)
    cache.end_step()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("min_saved", [0, step_index.MIN_SAVED])
@pytest.mark.parametrize("seed", range(4))
def test_a_sequence_sees_exactly_its_own_past(
    seed: int, min_saved: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a smallest saving, seven slots are attended to in up to four chunks.
    monkeypatch.setattr(step_index, "MIN_SAVED", min_saved)
    monkeypatch.setattr(step_index, "MIN_CHUNK", 2)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cache = SlotCache(max_slots=7, max_length=300)
    expected: list[Plain] = []
    waiting: list[tuple[CapturedRow, Path]] = []
    for _ in range(40):
        if not waiting:
            row, paths = make_row(generator, draw)
            waiting = [(row, path) for path in paths]
        num = min(7 - len(expected), draw.randint(0, len(waiting)))
        if num:
            joining, waiting = waiting[:num], waiting[num:]
            cache.join(joining[0][0], [path for _, path in joining])
            expected += [Plain(row, path) for row, path in joining]
        while expected and draw.random() < 0.4:
            slot = draw.randrange(len(expected))
            cache.leave(slot)
            expected[slot] = expected[-1]
            expected.pop()
        if expected:
            step(cache, expected, generator, window)
    assert len(cache.stems) <= len(expected)
    while expected:
        cache.leave(len(expected) - 1)
        expected.pop()
    assert not cache.stems and not cache.num_running


def test_a_step_that_failed_can_be_repeated() -> None:
    generator, draw = torch.Generator().manual_seed(1), random.Random(1)
    cache = SlotCache(max_slots=7, max_length=300)
    row, paths = make_row(generator, draw)
    cache.join(row, paths)
    cache.begin_step()
    cache.attend(0, *torch.randn(3, 4, HEADS, 1, WIDTH), scaling=None, window=None)
    step(cache, [Plain(row, path) for path in paths], generator, None)


def index_of(lengths: list[int]) -> StepIndex:
    """Return the index of sequences on one stem."""
    return StepIndex([Stem((0, 0), 9, list(range(len(lengths))))], [0] * len(lengths), lengths, torch.device("cpu"))


def test_chunks_are_made_where_they_save_padding() -> None:
    assert index_of([20] * 32).chunks == [(slice(0, 32), 21)]
    assert index_of([10] * 24 + [60] * 8).chunks == [(slice(0, 32), 61)]
    chunks = index_of([10] * 24 + [300] * 8).chunks
    assert chunks == [(slice(0, 8), 11), (slice(8, 16), 11), (slice(16, 24), 11), (slice(24, 32), 301)]


def test_what_is_shared_is_stored_once() -> None:
    row, paths = make_row(torch.Generator().manual_seed(0), random.Random(0))
    cache = SlotCache(max_slots=7, max_length=300)
    cache.join(row, paths[:2])
    cache.join(row, paths[2:])
    assert [sorted(stem.slots) for stem in cache.stems] == [[0], [1, 2, 3]]
    another, _ = make_row(torch.Generator().manual_seed(0), random.Random(0))
    cache.join(another, paths[1:2])
    assert len(cache.stems) == 3


def test_paths_are_divided_where_it_saves_most() -> None:
    # A root of 2 tokens for all five, an image of 10 for three of them, a word of 1 for two of those.
    lengths = [2, 10, 1, 3, 3, 3, 4, 4]
    segment_ids = torch.arange(8).repeat_interleave(torch.tensor(lengths))
    nodes = [(0, 1, 2, 3), (0, 1, 2, 4), (0, 1, 5), (0, 6), (0, 7)]
    paths = [torch.cat([(segment_ids == node).nonzero()[:, 0] for node in on_path]) for on_path in nodes]
    divided = divided_paths(paths, segment_ids)
    assert [len(path.shared) for path in divided] == [12, 12, 12, 2, 2]
    assert [path.stem for path in divided] == [1, 1, 1, 0, 0]
    for path, whole in zip(divided, paths, strict=True):
        assert torch.equal(torch.cat([path.shared, path.rest]), whole)


def test_memory_is_given_back() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = SlotCache(max_slots=8, max_length=300)
    row, paths = make_row(generator, random.Random(0))
    cache.join(row, [*paths, *paths])
    expected = [Plain(row, path) for path in (*paths, *paths)]
    for _ in range(6):
        cache.leave(0)
        expected[0] = expected[-1]
        expected.pop()
    cache.shrink(2)
    assert all(buffer.shape[0] == 2 for buffer in (*cache.slot_states.keys, *cache.slot_states.values))
    assert all(buffer.shape[0] == len(cache.stems) for buffer in cache.stem_states.keys)
    step(cache, expected, generator, None)
