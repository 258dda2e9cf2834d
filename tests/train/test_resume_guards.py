"""Torn checkpoints are passed over; an epoch never goes on in another order of rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.train.order import describe
from tests.runs import arguments, losses, train, write_parts

EVERY_STEP = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps with a checkpoint each."""
    folder = tmp_path_factory.mktemp("whole")
    train(arguments(parts, folder, **EVERY_STEP))
    return folder


def interrupted(whole: Path, target: Path, *, after: int) -> Path:
    """The run as it would be had it died right after checkpoint number `after`."""
    shutil.copytree(whole, target)
    for step in range(after + 1, 7):
        shutil.rmtree(target / f"checkpoint-{step}")
    return target


def test_a_torn_state_is_passed_over(parts: Path, whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", after=4)
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:300])
    train(arguments(parts, folder, **EVERY_STEP))
    assert losses(folder) == losses(whole)
    state.write_text(state.read_text()[:300])
    with pytest.raises(ConfigError, match="not written to its end"):
        train(arguments(parts, folder, **EVERY_STEP, resume_from_checkpoint=state.parent))


@pytest.mark.parametrize(
    "changed",
    [{"group_by_modality_length": True}, {"train_sampling_strategy": "sequential"}, {"image_grouping": "on"}],
)
def test_another_order_is_refused(parts: Path, whole: Path, tmp_path: Path, changed: dict[str, object]) -> None:
    folder = interrupted(whole, tmp_path / "run", after=3)
    with pytest.raises(ConfigError, match="cannot be resumed"):
        train(arguments(parts, folder, **{**EVERY_STEP, **changed}))


def test_another_number_of_questions_per_image_is_refused(parts: Path, tmp_path: Path) -> None:
    options = {**EVERY_STEP, "image_grouping": "on"}
    train(arguments(parts, tmp_path, **options, questions_per_image=4, max_steps=2))
    with pytest.raises(ConfigError, match="up to 4 of an image"):
        train(arguments(parts, tmp_path, **options, questions_per_image=2))


def test_grouping_by_image_depends_on_the_number_of_ranks() -> None:
    """Groups are cut where a rank's share ends, so a resume on other ranks would repeat rows and miss others."""
    from llava.data.samplers import ImageGroupedSampler, RandomSampler

    groups = [group for group, size in enumerate((5, 7, 1, 6, 3, 7, 2)) for _ in range(size)]
    one = ImageGroupedSampler(groups, 8, questions_per_image=8)
    two = ImageGroupedSampler(groups, 4, questions_per_image=8, world_size=2)
    assert describe(one) != describe(two)
    assert describe(RandomSampler(31, 8)) == describe(RandomSampler(31, 4, world_size=2))
