"""Damaged and hostile state files end a resumed run in one line; a full disk leaves no half checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava.errors import CheckpointError
from llava.train.state_files import check_state_files, drop_incomplete, is_whole, restoring, whole_or_removed
from tests.support.runs import arguments, losses, train
from tests.support.torch_programs import table, value, write_archive

EVERY_STEP = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}
NESTED = b")" + b"\x85" * 300_000


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 3 steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    train(arguments(parts, folder, **EVERY_STEP))
    return folder


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run that was killed after step 2."""
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-3")
    (folder / "trainer_state.json").unlink()
    (folder / "model.safetensors").unlink()
    return Path(folder)


class Planted:
    """Ends the process when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('os')._exit(7)",)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def overwritten(file: Path) -> None:
    file.write_bytes(b"\x00" * file.stat().st_size)


def nested(file: Path) -> None:
    write_archive(file, table((NESTED, value(1))), storages=())


def countless(file: Path) -> None:
    write_archive(file, b"\x80\x02" + b"N" * 1_100_000 + b".", storages=())


def with_code(file: Path) -> None:
    torch.save({"state": Planted()}, file)


def of_another_kind(file: Path) -> None:
    torch.save([1, 2, 3], file)


def of_other_shapes(file: Path) -> None:
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [], "python": (3,), "_last_lr": 1}, file)


NAMES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
DAMAGES: dict[Callable[[Path], None], bool] = {
    truncated: True,
    emptied: True,
    overwritten: True,
    nested: True,
    countless: True,
    with_code: False,
    of_another_kind: False,
    of_other_shapes: False,
}
"""Damages, and whether they are seen before anything is loaded."""


def assert_one_line(text: str, file: Path) -> None:
    assert text.isprintable() and file.name in text and "overwrite-output-dir" in text, text
    assert "weights_only" not in text and "WeightsUnpickler" not in text


@pytest.mark.parametrize("name", [*NAMES, "scaler.pt", "rng_state_1.pth"])
@pytest.mark.parametrize("damage", [damage for damage, is_early in DAMAGES.items() if is_early])
def test_damaged_files_are_seen_before_anything_is_loaded(
    broken: Path, name: str, damage: Callable[[Path], None]
) -> None:
    checkpoint = broken / "checkpoint-2"
    check_state_files(checkpoint)
    file = checkpoint / name
    file.touch()
    if damage is truncated:
        torch.save({"x": torch.ones(99)}, file)
    damage(file)
    with pytest.raises(CheckpointError) as caught:
        check_state_files(checkpoint)
    assert_one_line(str(caught.value), file)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [truncated, with_code, of_another_kind])
def test_a_resumed_run_names_the_damaged_file(
    parts: Path, broken: Path, name: str, damage: Callable[[Path], None]
) -> None:
    file = broken / "checkpoint-2" / name
    damage(file)
    with pytest.raises(CheckpointError) as caught:
        train(arguments(parts, broken, **EVERY_STEP))
    text = str(caught.value)
    assert text.isprintable() and "checkpoint-2" in text and "overwrite-output-dir" in text
    assert "weights_only" not in text and (file.name in text or "rng_state*.pth" in text)


def test_without_the_damaged_checkpoint_the_run_is_repeated(parts: Path, whole: Path, broken: Path) -> None:
    with_code(broken / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(CheckpointError, match="overwrite-output-dir"):
        train(arguments(parts, broken, **EVERY_STEP))
    shutil.rmtree(broken / "checkpoint-2")  # as the message says
    train(arguments(parts, broken, **EVERY_STEP))
    assert losses(broken) == losses(whole)


@pytest.mark.parametrize(
    "content", ["{}", "[1]", '{"global_step": "2"}', '{"global_step": 2', '{"global_step": null}', "\x00" * 50, ""]
)
def test_an_incomplete_state_is_not_resumed(broken: Path, content: str) -> None:
    (broken / "checkpoint-2" / "trainer_state.json").write_text(content)
    assert not is_whole(broken / "checkpoint-2") and is_whole(broken / "checkpoint-1")


@pytest.mark.parametrize("content", [{"global_step": 2, "unknown": 1}, {"global_step": 2, "stateful_callbacks": 3}])
def test_a_state_of_other_fields_is_one_line(broken: Path, content: object) -> None:
    file = broken / "checkpoint-2" / "trainer_state.json"
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        check_state_files(file.parent)
    assert_one_line(str(caught.value), file)


@pytest.mark.parametrize("damage", [with_code, of_another_kind, of_other_shapes])
def test_the_scaler_of_fp16(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    file = tmp_path / "scaler.pt"
    damage(file)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(CheckpointError) as caught, restoring(str(tmp_path), "the loss scaler", [file.name]):
        scaler.load_state_dict(torch.load(file, weights_only=True))
    assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt(), RuntimeError("file write failed")])
@pytest.mark.parametrize("has_state", [False, True])
def test_an_error_while_saving_leaves_no_half_checkpoint(tmp_path: Path, error: BaseException, has_state: bool) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").touch()
    if has_state:
        (checkpoint / "trainer_state.json").write_text('{"global_step": 4}')
    with pytest.raises(type(error)), whole_or_removed(checkpoint):
        raise error
    assert checkpoint.exists() == has_state


def test_what_a_killed_run_left_is_removed(broken: Path) -> None:
    kept = {path.name for path in broken.iterdir()}
    for place in (broken, broken / "checkpoint-2"):
        (place / ".saving-abc").mkdir()
        (place / ".saving-abc" / "model.safetensors").touch()
        (place / ".metrics.jsonl.tmp").touch()
    half = broken / "checkpoint-7"
    half.mkdir()
    (half / "optimizer.pt").touch()
    (broken / "checkpoint-notes").mkdir()
    drop_incomplete(broken)
    assert {path.name for path in broken.iterdir()} == {*kept, "checkpoint-notes"}
    assert not list(broken.glob("*/.*"))
