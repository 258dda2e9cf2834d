"""Mixture sampler: every source is drawn by its weight, over epochs and ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from llava.data.mixture import Shares
from llava.data.samplers import ImageGroupedSampler, MixtureSampler, RandomSampler, StepSampler

NAMES = ("first", "second")


def sampler(sizes: Sequence[int], weights: Sequence[float], *, rank: int = 0, world_size: int = 1) -> MixtureSampler:
    of_row = tuple(source for source, size in enumerate(sizes) for _ in range(size))
    ranks = {"rank": rank, "world_size": world_size, "seed": 3}

    def make(rows: Sequence[int]) -> StepSampler:
        return RandomSampler(len(rows), 4, **ranks)

    return MixtureSampler(Shares(NAMES, tuple(weights), of_row), 4, make=make, **ranks)


def drawn(order: StepSampler, epoch: int) -> Counter[int]:
    order.set_epoch(epoch)
    return Counter(row for step in order for row in step)


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    weights=st.tuples(st.floats(0.2, 3.5), st.floats(0.2, 3.5)),
    world_size=st.integers(1, 3),
)
def test_each_row_is_drawn_as_often_as_its_weight_says(
    sizes: tuple[int, int], weights: tuple[float, float], world_size: int
) -> None:
    ranks = [sampler(sizes, weights, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(2):
        found = sum((drawn(order, epoch) for order in ranks), Counter[int]())
        assert found.total() == ranks[0].num_rows
        for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            rows = range(sum(sizes[:source]), sum(sizes[: source + 1]))
            counts = [found[row] for row in rows]
            assert sum(counts) == max(1, int(weight) * size + round((weight % 1) * size))
            assert max(counts) - min(counts) <= 2  # 2 where one random pass ends and the next begins


def test_epochs_of_a_part_cover_all_rows() -> None:
    order = sampler((8, 4), (0.25, 1.0))
    found = sum((drawn(order, epoch) for epoch in range(4)), Counter[int]())
    assert found == Counter({**dict.fromkeys(range(8), 1), **dict.fromkeys(range(8, 12), 4)})
    assert drawn(order, 0) != drawn(order, 1) and drawn(order, 1) == drawn(sampler((8, 4), (0.25, 1.0)), 1)


def test_rows_of_one_image_stay_together() -> None:
    shares = Shares(NAMES, (2.0, 1.0), (0, 0, 0, 1, 1, 1))
    images = ["a", "a", "a", "b", "b", "b"]

    def make(rows: Sequence[int]) -> StepSampler:
        return ImageGroupedSampler([images[row] for row in rows], 3, questions_per_image=3, seed=0)

    steps = list(MixtureSampler(shares, 3, make=make))
    assert len(steps) == 3 and all(len({images[row] for row in step}) == 1 for step in steps)
