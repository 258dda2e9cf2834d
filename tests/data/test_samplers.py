"""Samplers: every row once over all ranks, equal numbers of steps, the same plan everywhere, groups together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.records import load_samples
from llava.data.samplers import (
    ImageGroupedSampler,
    LengthGroupedSampler,
    ModalityGroupedSampler,
    RandomSampler,
    SequentialSampler,
    StepSampler,
)
from llava.errors import ConfigError

Build = Callable[[list[int], int, int, int, int], StepSampler]

KINDS: dict[str, Build] = {
    "sequential": lambda data, n, rank, world, seed: SequentialSampler(
        len(data), n, rank=rank, world_size=world, seed=seed
    ),
    "random": lambda data, n, rank, world, seed: RandomSampler(len(data), n, rank=rank, world_size=world, seed=seed),
    "length": lambda data, n, rank, world, seed: LengthGroupedSampler(data, n, rank=rank, world_size=world, seed=seed),
    "modality": lambda data, n, rank, world, seed: ModalityGroupedSampler(
        data, n, rank=rank, world_size=world, seed=seed
    ),
    "image": lambda data, n, rank, world, seed: ImageGroupedSampler(
        [None if value < 0 else value % 7 for value in data],
        n,
        questions_per_image=1 + abs(data[0]) % 5,
        rank=rank,
        world_size=world,
        seed=seed,
    ),
}

rows = st.lists(st.integers(-30, 30), min_size=1, max_size=120)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=rows, num=st.integers(1, 9), world=st.integers(1, 4), order=st.tuples(st.integers(0, 3), st.integers(0, 2)))
def test_every_row_exactly_once_over_all_ranks(
    kind: str, data: list[int], num: int, world: int, order: tuple[int, int]
) -> None:
    seed, epoch = order
    samplers = [KINDS[kind](data, num, rank, world, seed) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ranks = [list(sampler) for sampler in samplers]
    assert Counter(row for lists in ranks for rows in lists for row in rows) == Counter(range(len(data)))
    assert [len(lists) for lists in ranks] == [len(sampler) for sampler in samplers]
    for number, step in enumerate(zip(*ranks, strict=True)):
        sizes = [len(rows) for rows in step]
        assert max(sizes) <= num
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == num * world or number == len(samplers[0]) - 1


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=rows, num=st.integers(1, 5), world=st.integers(1, 3), cut=st.floats(0, 1))
def test_resuming_yields_the_rest_of_the_epoch(kind: str, data: list[int], num: int, world: int, cut: float) -> None:
    seed = len(data)
    sampler = KINDS[kind](data, num, world - 1, world, seed)
    sampler.set_epoch(3)
    whole = list(sampler)
    assert list(sampler) == whole
    start = int(cut * len(whole))
    other = KINDS[kind](data, num, world - 1, world, seed)
    other.set_epoch(3, start_step=start)
    assert list(other) == whole[start:]


@pytest.mark.parametrize("kind", ["random", "length", "modality", "image"])
def test_seed_and_epoch_decide_the_order(kind: str) -> None:
    data = [(value * 7) % 31 - 8 for value in range(80)]

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = KINDS[kind](data, 4, 0, 1, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(first != second for n, first in enumerate(orders) for second in orders[:n])
    assert order(1, 2) == order(1, 2)


@pytest.mark.parametrize("kind", ["sequential", "random", "length", "modality"])
@settings(max_examples=25, deadline=None)
@given(data=rows, num=st.integers(1, 4))
def test_steps_hold_the_same_rows_on_any_number_of_ranks(kind: str, data: list[int], num: int) -> None:
    def steps(world: int) -> list[list[int]]:
        ranks = [list(KINDS[kind](data, num * 4 // world, rank, world, 0)) for rank in range(world)]
        return [sorted(row for rows in step for row in rows) for step in zip(*ranks, strict=True)]

    assert steps(1) == steps(2) == steps(4)


def test_length_grouping_balances_the_ranks() -> None:
    lengths = [10 + (value * 37) % 200 for value in range(64)]
    ranks = [list(LengthGroupedSampler(lengths, 8, rank=rank, world_size=4)) for rank in range(4)]
    for step in zip(*ranks, strict=True):
        totals = [sum(lengths[row] for row in rows) for rows in step]
        assert max(totals) - min(totals) <= max(lengths) * 0.2
        assert all(rows == sorted(rows, key=lambda row: -lengths[row]) for rows in step)


def test_modalities_are_mixed_in_the_rest_only() -> None:
    lengths = [50] * 37 + [-20] * 21
    sampler = ModalityGroupedSampler(lengths, 4)
    steps = list(sampler)
    mixed = [number for number, rows in enumerate(steps) if len({lengths[row] > 0 for row in rows}) > 1]
    # 37 = 9 x 4 + 1 and 21 = 5 x 4 + 1: one row of either kind is left, and comes last.
    assert mixed == [len(steps) - 1] == [14]
    assert len(steps[-1]) == 2
    kinds = [lengths[rows[0]] > 0 for rows in steps[:-1]]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)


def test_one_modality_falls_back_to_length_grouping() -> None:
    lengths = [(value * 7) % 31 for value in range(20)]
    assert list(ModalityGroupedSampler(lengths, 4)) == list(LengthGroupedSampler(lengths, 4))
    negative = [-length - 1 for length in lengths]
    assert list(ModalityGroupedSampler(negative, 4)) == list(LengthGroupedSampler(negative, 4))


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)])
def test_full_groups_of_an_image_stay_whole(rank: int, world: int) -> None:
    groups = [f"image{row % 12}" for row in range(12 * 8)]
    for rows in ImageGroupedSampler(groups, 16, questions_per_image=8, rank=rank, world_size=world):
        assert set(Counter(groups[row] for row in rows).values()) <= {8}


def test_uneven_groups_are_split_at_most_once_a_list() -> None:
    groups = [f"image{number}" for number in range(40) for _ in range(1 + number % 7)]
    sampler = ImageGroupedSampler(groups, 8, questions_per_image=7, seed=5)
    homes: dict[str, list[int]] = {}
    steps = list(sampler)
    for number, rows in enumerate(steps):
        for group in {groups[row] for row in rows}:
            homes.setdefault(group, []).append(number)
    split = sum(len(steps_of) > 1 for steps_of in homes.values())
    assert len(homes) == 40
    assert split <= 8


def test_questions_per_image_bounds_a_group_and_images_are_spread() -> None:
    groups = ["a"] * 30 + [f"b{row}" for row in range(90)]
    sampler = ImageGroupedSampler(groups, 12, questions_per_image=3)
    per_step = [sum(groups[row] == "a" for row in rows) for rows in sampler]
    assert sum(per_step) == 30
    assert sum(count > 0 for count in per_step) >= 5


def test_questions_per_image_above_the_step_is_cut_to_it() -> None:
    assert [len(rows) for rows in ImageGroupedSampler(["a"] * 10, 4, questions_per_image=99)] == [4, 4, 2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomSampler(0, 4), "no rows"),
        (lambda: RandomSampler(3, 0), "sequences_per_step"),
        (lambda: RandomSampler(3, 1, rank=2, world_size=2), "rank must be from 0 to 1"),
        (lambda: ImageGroupedSampler(["a"], 1, questions_per_image=0), "questions_per_image"),
        (lambda: RandomSampler(3, 1).set_epoch(0, start_step=4), "from 0 to 3, got 4"),
    ],
)
def test_counts_out_of_range_are_errors(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(("run", "batch_size", "num_batches"), [("stage2_full", 4, 2), ("stage2_lora", 4, 1)])
def test_steps_are_made_as_in_the_published_runs(shared: Path, run: str, batch_size: int, num_batches: int) -> None:
    """Rows are in the recorded order: steps of one kind, mixed remainders last, equal distribution within a step."""
    oracle = shared / "oracles" / "llava-1.2.2"
    samples = load_samples(oracle / "train.json")
    words = [sum(len(turn.text.split()) for turn in sample.conversation.turns) for sample in samples]
    lengths = [num + 128 if sample.images else -num for num, sample in zip(words, samples, strict=True)]
    order = json.loads((oracle / "train_log.json").read_text())[run]["order"]
    size = batch_size * num_batches

    def kinds(steps: list[list[int]]) -> list[set[bool]]:
        return [{lengths[row] < 0 for row in step} for step in steps]

    for start in range(0, len(order), len(samples)):
        epoch = order[start : start + len(samples)]
        steps = [epoch[first : first + size] for first in range(0, len(epoch), size)]
        ours = list(ModalityGroupedSampler(lengths, size, seed=start))
        assert kinds(steps) == kinds(ours)
        # The first step of an epoch holds rows of one kind; there, "ranks" are the micro-batches of the published run.
        rows = sorted(steps[0])
        parts = [
            list(LengthGroupedSampler([lengths[row] for row in rows], batch_size, rank=rank, world_size=num_batches))
            for rank in range(num_batches)
        ]
        assert [row for part in parts for row in part[0]] == [rows.index(row) for row in steps[0]]
