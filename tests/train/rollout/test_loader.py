"""Loader of rollouts: order of the cases, parts of a rollout, saving and restoring, and when a run stops."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava.data.encode import Encoded
from llava.errors import CheckpointError, ConfigError, DataError
from llava.train.rollout.loader import CaseOrder, RolloutLoader
from llava.train.rollout.rollout import Rollout
from tests.support.rollouts import episode, spec

CASES: Any = list(range(5))


def loader(
    *, groups: int = 4, equal: bool = False, rank: int = 0, world_size: int = 1, **changed: object
) -> RolloutLoader:
    """Return a loader whose rollouts are made up: a sequence's first token is its group, its second the sample."""
    written: list[int] = []

    def make(step: int, next_case: Callable[[], Any], control: Any) -> Rollout:
        draw = random.Random(step)
        cases = [next_case() for _ in range(groups)]
        found = [episode(g, s, draw, score=0.0 if equal else None) for g in range(groups) for s in range(2)]
        for e in found:
            e.dropped = equal
            e.case = str(cases[e.group])
        own = {
            (e.group, e.sample): Encoded((e.group, e.sample, step), (-100, e.sample, 3), (0, 1, 1),
                                         columns={"advantage": (0.0, draw.random(), 0.1)}, numbers={"length": 2.0})
            for e in found
            if e.group % world_size == rank
        }  # fmt: skip
        return Rollout(step, found, own, groups)

    collator = SimpleNamespace(
        dataset=SimpleNamespace(images_for=lambda _: {}), max_tokens_per_row=None, rows=lambda units, *_: [len(units)]
    )
    settings = spec("grpo", group_size=2, rollout_batch=2 * groups, **({"step_batch": 2 * groups} | changed))
    made = RolloutLoader(
        make, CaseOrder(CASES, 3), collator, settings, seed=1, on_rollout=lambda r, _: written.append(r.step),
        rank=rank, world_size=world_size,
    )  # type: ignore[arg-type]  # fmt: skip
    made.written = written  # type: ignore[attr-defined]
    return made


def units(made: RolloutLoader, num: int) -> list[list[tuple[int, ...]]]:
    """Return the first tokens of the units of the next updates."""
    return [[unit[0].input_ids for unit in step.units] for _, step in zip(range(num), made, strict=False)]


def test_every_epoch_has_every_case_once_in_another_order() -> None:
    order = CaseOrder(CASES, 0)
    epochs = [[order() for _ in CASES] for _ in range(4)]
    assert all(sorted(epoch) == CASES for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    resumed = CaseOrder(CASES, 0, place=12)
    assert [resumed() for _ in range(8)] == [*epochs[2][2:], *epochs[3]]


def test_a_rollout_is_used_up_before_the_next_and_written_first() -> None:
    made = loader(passes=2, step_batch=4)
    found = units(made, 5)
    steps = [[ids[2] for ids in update] for update in found]
    assert steps == [[1, 1]] * 4 + [[2, 2]] and made.written == [1, 2]  # type: ignore[attr-defined]
    for start in (0, 2):
        assert sorted(ids[0] for update in found[start : start + 2] for ids in update) == [0, 1, 2, 3]


def test_ranks_have_the_parts_of_one_process() -> None:
    whole = units(loader(passes=2, step_batch=4), 4)
    parts = [units(loader(passes=2, step_batch=4, rank=rank, world_size=2), 4) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(update) for update in whole]


def test_a_restored_loader_continues(tmp_path: Path) -> None:
    made = loader(passes=2, step_batch=4)
    expected = units(loader(passes=2, step_batch=4), 12)
    assert units(made, 6) == expected[:6]
    made.save(tmp_path)
    resumed = loader(passes=2, step_batch=4)
    resumed.restore(tmp_path)
    columns = {group: [s.columns for s in unit] for group, unit in made.units.items()}
    assert {group: [s.columns for s in unit] for group, unit in resumed.units.items()} == columns
    assert units(resumed, 6) == expected[6:]
    assert resumed.written == [3]  # type: ignore[attr-defined]


def test_a_used_up_rollout_is_not_saved(tmp_path: Path) -> None:
    made = loader()
    units(made, 1)
    made.save(tmp_path)
    assert json.loads((tmp_path / "rollout_state-0.json").read_text())["units"] == {}


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("{}", "rollout"), ("[1", "Expecting")])
def test_a_broken_state_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "rollout_state-0.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        loader().restore(tmp_path)


def test_another_number_of_ranks_cannot_restore(tmp_path: Path) -> None:
    made = loader(world_size=2)
    units(made, 1)
    made.save(tmp_path)
    with pytest.raises(ConfigError, match="was written by 2 processes, this run has 1"):
        loader().restore(tmp_path)


def test_twenty_rollouts_without_spread_stop_and_name_the_nodes() -> None:
    made = loader(equal=True)
    with pytest.raises(DataError, match=r"step 20: in 20 rollouts .* never differ in x \(a\); y \(b\)") as caught:
        units(made, 30)
    assert "Raise --temperature" in str(caught.value)


def test_groups_without_spread_are_not_learned_from() -> None:
    [step] = [step for _, step in zip(range(1), loader(equal=True), strict=False)]
    assert step.units == [] and step.rows == []


def test_size_of_forward_passes() -> None:
    [step] = [step for _, step in zip(range(1), loader(row_batch=4), strict=False)]
    assert step.rows == [2, 2]
