"""The output folder of a run: one run at a time, a full disk, a read-only folder, a folder that is removed."""

from __future__ import annotations

import io
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import ConfigError
from llava.eval.answering import model_vqa_med
from llava.eval.run import main as evaluate
from llava.quickstart.command import main as quickstart
from llava.utils.cli import run_program
from llava.utils.files import exclusive_file, exclusive_folder
from tests.support.disks import make_read_only, small_disk
from tests.support.ranks import run_ranks, start
from tests.support.runs import arguments, losses, saved, steps, train

EVERY_STEP = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}


def ended(argv: list[str], prepare: Callable[..., None] | None = None, *values: Any) -> tuple[object, str]:
    """Job: a training program; returns its exit status and the lines of its error."""
    if prepare is not None:
        prepare(*values)
    errors = io.StringIO()
    with pytest.raises(SystemExit) as stop, redirect_stderr(errors):
        run_program(lambda: train(argv))
    return stop.value.code, errors.getvalue()[errors.getvalue().index("llava: error: ") :]


def refused(argv: list[str], prepare: Callable[..., None] | None = None, *values: Any) -> str:
    """Return the one line with which a training program ends."""
    ((status, text),) = run_ranks(1, ended, argv, prepare, *values)
    assert status == 2 and text.count("\n") == 1 and "Traceback" not in text, text
    return str(text)


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 6 steps."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(1, train, arguments(parts, folder, **EVERY_STEP))
    return folder


def assert_continues(parts: Path, folder: Path, whole: Path) -> None:
    """The same command ends with the results of an undisturbed run and leaves nothing else."""
    run_ranks(1, train, arguments(parts, folder, **EVERY_STEP))
    assert steps(folder) == [1, 2, 3, 4, 5, 6] and losses(folder) == losses(whole)
    assert all(torch.equal(tensor, saved(folder)[name]) for name, tensor in saved(whole).items())
    assert files(folder) == files(whole)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != "filler"}


@pytest.mark.parametrize("others", [{}, {"overwrite_output_dir": True}, {"lora_enable": True}, {"skip_bad": True}])
def test_the_second_run_writes_nothing(parts: Path, whole: Path, tmp_path: Path, others: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    with exclusive_folder(folder, option="--output-dir"):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(ConfigError, match="another run is writing into"):
            train(arguments(parts, folder, **{**EVERY_STEP, **others}))
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_ranks_of_the_second_run_end(parts: Path, tmp_path: Path) -> None:
    with exclusive_folder(tmp_path / "run", option="--output-dir"):
        outcomes = start(2, train, arguments(parts, tmp_path / "run", per_device_train_batch_size=2))
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert all(kind == "error" and "another run is writing into" in text for kind, text in outcomes)


def test_a_dry_run_needs_no_claim(parts: Path, tmp_path: Path) -> None:
    with exclusive_folder(tmp_path / "run", option="--output-dir"):
        run_ranks(1, train, arguments(parts, tmp_path / "run", dry_run=True, max_steps=1))


def test_other_commands_with_one_output(parts: Path, tmp_path: Path) -> None:
    data = ["--data", str(parts / "vqa" / "train.json"), "--image-folder", str(parts / "vqa" / "images")]
    out = tmp_path / "out"
    with exclusive_folder(out, option="--out"), pytest.raises(ConfigError, match=r"another run .*--out"):
        evaluate(["--model", str(parts / "lm"), *data, "--out", str(out)])
    with exclusive_folder(out, option="--out"), pytest.raises(ConfigError, match=r"another run .*--out"):
        quickstart(["--out", str(out), "--lm", str(parts / "lm"), "--vision-tower", str(parts / "tower"), "--restart"])
    answers = tmp_path / "answers.jsonl"
    words = ["--model-name", str(parts / "lm"), "--question-file", data[1], *data[2:], "--answers-file", str(answers)]
    with exclusive_file(answers, option="x"), pytest.raises(ConfigError, match=r"another run .*--answers-file"):
        model_vqa_med(words)
    assert not list(tmp_path.iterdir())


def limit_files(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


LARGEST = ("trainer_state.json", "rng_state.pth", "model.safetensors", "optimizer.pt")


@pytest.mark.parametrize("name", LARGEST)
def test_a_file_size_limit_while_saving(parts: Path, whole: Path, tmp_path: Path, name: str) -> None:
    """The limit is one byte below the size of a file of the checkpoint, so that this or a larger one fails."""
    limit = (whole / "checkpoint-4" / name).stat().st_size - 1
    line = refused(arguments(parts, tmp_path, **EVERY_STEP), limit_files, limit)
    assert "limit" in line and "rerun the same command" in line
    assert all((path / "trainer_state.json").is_file() for path in tmp_path.glob("checkpoint-*"))
    assert_continues(parts, tmp_path, whole)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    with small_disk(tmp_path / "disk", "8m") as folder:
        yield folder


@pytest.mark.parametrize("share", [0.4, *(pytest.param(share, marks=pytest.mark.extended) for share in (0.02, 0.8))])
def test_a_full_disk_while_saving(parts: Path, whole: Path, disk: Path, share: float) -> None:
    written = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    free = shutil.disk_usage(disk).free
    assert written < free
    (disk / "filler").write_bytes(b"\x00" * (free - int(share * written)))
    line = refused(arguments(parts, disk / "run", **EVERY_STEP))
    assert "full" in line
    (disk / "filler").unlink()
    assert_continues(parts, disk / "run", whole)


def test_a_read_only_folder_is_named(parts: Path, disk: Path) -> None:
    make_read_only(disk)
    line = refused(arguments(parts, disk / "run", **EVERY_STEP))
    assert f"the folder {disk} is read-only" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(parts: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert f"the folder {tmp_path} is read-only" in refused(arguments(parts, tmp_path / "run", **EVERY_STEP))


def disturb_at(step: int, event: str, change: Callable[[Path], None], folder: Path) -> None:
    """Change the run folder when a step is logged or finished."""
    from transformers import TrainerCallback

    from llava.train import run as training

    class Disturb(TrainerCallback):
        def run(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                change(folder)

    setattr(Disturb, event, Disturb.run)
    make = training.make_trainer

    def with_change(*values: Any, **named: Any) -> Any:
        trainer = make(*values, **named)
        trainer.add_callback(Disturb())
        return trainer

    training.make_trainer = with_change


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replace(folder: Path) -> None:
    rename(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("step", "event", "change"),
    [
        (1, "on_step_begin", remove),
        (3, "on_log", remove),
        (6, "on_step_end", remove),
        (3, "on_step_end", rename),
        (3, "on_step_end", replace),
        (6, "on_train_end", remove),
    ],
)
def test_a_removed_folder(parts: Path, tmp_path: Path, step: int, event: str, change: Callable[[Path], None]) -> None:
    folder = tmp_path / "run"
    options = {**EVERY_STEP, "logging_steps": 1 if event != "on_train_end" else 6}
    line = refused(arguments(parts, folder, **options), disturb_at, step, event, change, folder)
    assert f"{folder} was removed while this run" in line
    assert not folder.exists() or not list(folder.iterdir())
