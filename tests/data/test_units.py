"""Units: sequences that belong together share a row, and carry numbers and columns to their edges."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IGNORE_INDEX
from llava.data.collator import joined_rows
from llava.data.encode import Encoded, Unit, as_unit
from llava.data.flat_batch import FlatBatch, Layout, flatten, layout_rows
from llava.errors import DataError
from tests.support.trees import IMAGE, encoded, random_images, random_sequences

IMAGES = random_images(2)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def flat(sequences: list[Encoded], *, sizes: list[int] | None = None, layout: Layout = "tree") -> FlatBatch:
    return flatten(sequences, IMAGES, image_token_id=IMAGE, layout=layout, unit_sizes=sizes)


def random_units(chance: random.Random, num_units: int) -> list[Unit]:
    """Return units of one to four sequences; the weight of each sequence is the number of its unit."""
    sizes = [chance.randint(1, 4) for _ in range(num_units)]
    sequences = iter(random_sequences(chance, sum(sizes)))
    return [tuple(replace(next(sequences), weight=float(unit)) for _ in range(size)) for unit, size in enumerate(sizes)]


@given(
    chance=st.randoms(use_true_random=False),
    num_units=st.integers(1, 6),
    limit=st.sampled_from([None, 1, 20, 60]),
    layout=st.sampled_from(LAYOUTS),
)
@settings(max_examples=80, deadline=None)
def test_no_unit_is_split(chance: random.Random, num_units: int, limit: int | None, layout: Layout) -> None:
    units = random_units(chance, num_units)
    rows = layout_rows(units, IMAGES, image_token_id=IMAGE, max_tokens_per_row=limit, layout=layout)
    assert sum(row.num_units for row in rows) == num_units
    found: dict[float, list[tuple[int, ...]]] = {}
    for row in rows:
        ids = row.input_ids.flatten()
        owners = row.sequence_values["weight"].tolist()
        for unit in range(row.num_units):
            members = torch.nonzero(row.sequence_unit == unit).flatten().tolist()
            assert row.sequence_place[members].tolist() == list(range(len(members)))
            assert len({owners[member] for member in members}) == 1
            assert owners[members[0]] not in found
            found[owners[members[0]]] = [tuple(ids[row.paths()[member]].tolist()) for member in members]
    assert found == {float(number): [s.input_ids for s in unit] for number, unit in enumerate(units)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_over_the_limit_get_rows_of_their_own(layout: Layout) -> None:
    pairs = [(encoded(["a", 5, 6 + n, 7, 7]), encoded(["a", 5, 6 + n, 8, 8])) for n in range(3)]
    rows = layout_rows(pairs, IMAGES, image_token_id=IMAGE, max_tokens_per_row=9, layout=layout)
    assert [(row.num_units, row.num_sequences) for row in rows] == [(1, 2)] * 3


def test_a_sequence_alone_is_a_unit() -> None:
    sequence = encoded([5, 6])
    assert as_unit(sequence) == (sequence,) and as_unit((sequence, sequence)) == (sequence, sequence)
    batch = flat([sequence, sequence])
    assert (batch.sequence_unit.tolist(), batch.sequence_place.tolist()) == ([0, 1], [0, 0])


@pytest.mark.parametrize("sizes", [[1], [2, 1, 1], [3, 0]])
def test_units_must_add_up(sizes: list[int]) -> None:
    with pytest.raises(DataError, match="do not add up to the 3 sequences"):
        flat([encoded([5, 6])] * 3, sizes=sizes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_follow_the_trained_tokens(layout: Layout) -> None:
    def sequence(last: int, base: float) -> Encoded:
        plain = encoded(["a", 6, 7, last], trained=[5, 6])
        return replace(plain, columns={"advantage": [base + place for place in range(len(plain.input_ids))]})

    batch = flat([sequence(8, 0.0), sequence(9, 100.0)], layout=layout)
    assert batch.edge_values["advantage"].dtype == torch.float32
    found = zip(batch.edge_sequence.tolist(), batch.edge_values["advantage"].tolist(), strict=True)
    assert sorted(found) == [(0, 5.0), (0, 6.0), (1, 105.0), (1, 106.0)]


def test_numbers_of_sequences_are_float64() -> None:
    numbered = [replace(encoded([5, 6]), numbers={"reference": -1e-9 - n}, weight=0.5) for n in range(2)]
    values = flat(numbered).to("cpu").sequence_values
    assert values["reference"].tolist() == [-1e-9, -1.000000001] and values["weight"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("field", ["numbers", "columns"])
def test_sequences_of_a_row_have_the_same_names(field: str) -> None:
    values = {"numbers": {"reference": 1.0}, "columns": {"reference": [1.0, 1.0]}}[field]
    with pytest.raises(DataError, match=rf"sequence 1 has {field} \[\], but sequence 0 has \['reference'\]"):
        flat([replace(encoded([5, 6]), **{field: values}), encoded([5, 6])])


def test_joined_rows_keep_units_and_columns() -> None:
    def pair(base: float) -> FlatBatch:
        columns = {"advantage": [base, base + 1]}
        members = [replace(encoded([5, 6 + n], trained=[1]), columns=columns, numbers={"x": base}) for n in range(2)]
        return flat(members, sizes=[2])

    idle = replace(flat([encoded([5, 6], trained=[1])]), sequence_unit=torch.tensor([-1]))
    both = joined_rows(pair(1.0), pair(3.0))
    assert (both.sequence_unit.tolist(), both.sequence_place.tolist(), both.num_units) == ([0, 0, 1, 1], [0, 1] * 2, 2)
    assert both.edge_values["advantage"].tolist() == [2.0, 2.0, 4.0, 4.0]
    assert both.sequence_values["x"].tolist() == [1.0, 1.0, 3.0, 3.0]
    filled = joined_rows(pair(1.0), idle)
    assert (filled.sequence_unit.tolist(), filled.num_units) == ([0, 0, -1], 1)
    assert filled.edge_values["advantage"].tolist() == [2.0, 2.0, 0.0]


def test_labels_do_not_change_sharing() -> None:
    chosen = encoded(["a", 5, 6, 7, 7], trained=[6, 7])
    rejected = replace(chosen, labels=(IGNORE_INDEX,) * len(chosen.labels))
    assert flat([chosen, rejected], sizes=[2]).num_tokens == len(chosen.input_ids)
