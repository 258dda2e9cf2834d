"""Resuming skips incomplete checkpoints, and rejects another order of rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llava.errors import CheckpointError, ConfigError
from llava.train.data import order_of
from llava.utils.cli import flag
from tests.support.runs import arguments, losses, train

EVERY_STEP = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    train(arguments(parts, folder, **EVERY_STEP))
    return folder


def interrupted(whole: Path, target: Path, *, after: int) -> Path:
    """Return a copy of the run that ends after checkpoint number `after`, without the files of its end."""
    shutil.copytree(whole, target)
    (target / "trainer_state.json").unlink()
    (target / "model.safetensors").unlink()
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
    with pytest.raises(ConfigError, match="missing or incomplete"):
        train(arguments(parts, folder, **EVERY_STEP, resume_from_checkpoint=state.parent))


@pytest.mark.parametrize(
    "changed",
    [{"group_by_modality_length": True}, {"train_sampling_strategy": "sequential"}, {"image_grouping": "on"}],
)
def test_another_order_is_refused(parts: Path, whole: Path, tmp_path: Path, changed: dict[str, object]) -> None:
    folder = interrupted(whole, tmp_path / "run", after=3)
    with pytest.raises(ConfigError, match="cannot be resumed"):
        train(arguments(parts, folder, **{**EVERY_STEP, **changed}))


@pytest.mark.parametrize(
    "changed",
    [
        {"version": "plain"},
        {"learning_rate": 5e-2},
        {"model_max_length": 1024},
        {"weight_decay": 0.1},
        {"mm_projector_lr": 1e-4},
        {"vision_tower": "other_tower"},
    ],
)
def test_other_options_are_refused_and_the_folder_keeps_its_own(
    parts: Path, whole: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    before = (folder / "resolved_arguments.json").read_text()
    if "vision_tower" in changed:
        changed = {"vision_tower": shutil.copytree(parts / "tower", tmp_path / "other_tower")}
    with pytest.raises(ConfigError, match=rf"its run had {flag(next(iter(changed)))} "):
        train(arguments(parts, folder, **{**EVERY_STEP, **changed}))
    assert (folder / "resolved_arguments.json").read_text() == before


def test_another_model_of_the_same_shape_is_refused(parts: Path, whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", after=3)
    other = shutil.copytree(parts / "lm", tmp_path / "lm")
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).add_(1.0)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="model_sha256"):
        train(arguments(parts, folder, **EVERY_STEP, model_name_or_path=other))


def test_a_moved_run_goes_on(parts: Path, whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", after=3)
    moved = shutil.copytree(parts, tmp_path / "parts")
    train(arguments(moved, folder, **EVERY_STEP))
    assert losses(folder) == losses(whole)


def test_a_run_that_does_not_resume_leaves_no_older_checkpoint(parts: Path, whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", after=3)
    train(arguments(parts, folder, **EVERY_STEP, max_steps=2, resume_from_checkpoint=False))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_an_adapter_does_not_replace_its_base(parts: Path, whole: Path, tmp_path: Path) -> None:
    base = shutil.copytree(whole, tmp_path / "base")
    before = sorted(path.name for path in base.iterdir())
    options = {"lora_enable": True, "lora_r": 2, "overwrite_output_dir": True, "model_name_or_path": base}
    with pytest.raises(CheckpointError, match="builds on"):
        train(arguments(parts, base, **options, vision_tower=None))
    assert sorted(path.name for path in base.iterdir()) == before


def test_another_number_of_questions_per_image_is_refused(parts: Path, tmp_path: Path) -> None:
    options = {**EVERY_STEP, "image_grouping": "on"}
    train(arguments(parts, tmp_path, **options, questions_per_image=4, max_steps=2))
    with pytest.raises(ConfigError, match="up to 4 of an image"):
        train(arguments(parts, tmp_path, **options, questions_per_image=2))


def test_grouping_by_image_depends_on_the_number_of_ranks() -> None:
    """Groups do not cross the shards of ranks, so that other ranks would repeat rows and skip others."""
    from llava.data.samplers import ImageGroupedSampler, RandomSampler

    groups = [group for group, size in enumerate((5, 7, 1, 6, 3, 7, 2)) for _ in range(size)]
    one = ImageGroupedSampler(groups, 8, questions_per_image=8)
    two = ImageGroupedSampler(groups, 4, questions_per_image=8, world_size=2)
    assert order_of(one) != order_of(two)
    assert order_of(RandomSampler(31, 8)) == order_of(RandomSampler(31, 4, world_size=2))


def test_another_seed_is_refused(parts: Path, whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", after=3)
    with pytest.raises(ConfigError, match=r"cannot be resumed.*seed"):
        train(arguments(parts, folder, **{**EVERY_STEP, "seed": 7}))
