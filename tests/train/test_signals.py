"""SIGTERM saves a checkpoint (`--save-on-signal True`), from which the same command resumes with equal results."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import ConfigError
from llava.train.parsing import parse_training_args
from tests.support.ranks import run_ranks, start
from tests.support.runs import arguments, losses, saved, steps, train

OPTIONS = {"num_train_epochs": 2, "save_strategy": "no", "save_on_signal": True}
STOPPED = "SystemExit: 143"


def train_and_signal(argv: list[str], step: int, event: str, rank: int = 0) -> None:
    """Job: a run in which a rank, and every worker process of it, receives SIGTERM at an event of a step."""
    from transformers import TrainerCallback

    from llava.train import run as training

    class Signal(TrainerCallback):
        def send(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step and args.process_index == rank:
                children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
                subprocess.run(["kill", "-TERM", *children, str(os.getpid())], check=True)

    setattr(Signal, event, Signal.send)
    make = training.make_trainer

    def with_signal(*values: Any, **named: Any) -> Any:
        trainer = make(*values, **named)
        trainer.callback_handler.callbacks.insert(0, Signal())  # the signal comes before the others look for it
        return trainer

    training.make_trainer = with_signal
    train(argv)


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 6 steps."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(1, train, arguments(parts, folder, **OPTIONS))
    return folder


@pytest.mark.parametrize(
    ("moment", "others"),
    [
        ((0, "on_step_begin"), {}),
        ((2, "on_log"), {"save_strategy": "steps", "save_steps": 2}),
        ((4, "on_pre_optimizer_step"), {"dataloader_num_workers": 1}),
        pytest.param((1, "on_step_end"), {"save_total_limit": 1}, marks=pytest.mark.extended),
        pytest.param((3, "on_save"), {"save_strategy": "steps", "save_steps": 3}, marks=pytest.mark.extended),
    ],
)
def test_a_signal_saves_and_the_same_command_resumes(
    parts: Path, whole: Path, tmp_path: Path, moment: tuple[int, str], others: dict[str, Any]
) -> None:
    argv = arguments(parts, tmp_path, **{**OPTIONS, **others})
    ((kind, text),) = start(1, train_and_signal, argv, *moment)
    assert kind == "error" and text.startswith(STOPPED), text
    (last,) = [path for path in tmp_path.glob("checkpoint-*") if (path / "trainer_state.json").exists()][-1:]
    assert int(last.name.split("-")[1]) in (moment[0], moment[0] + 1)
    assert not (tmp_path / "model.safetensors").exists()
    run_ranks(1, train, argv)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6] and losses(tmp_path) == losses(whole)
    assert all(torch.equal(tensor, saved(tmp_path)[name]) for name, tensor in saved(whole).items())


def test_a_signal_to_one_of_two_ranks_stops_both(parts: Path, tmp_path: Path) -> None:
    argv = arguments(parts, tmp_path, **OPTIONS, per_device_train_batch_size=2)
    outcomes = start(2, train_and_signal, argv, 2, "on_step_begin", 1)
    assert [(kind, str(text).splitlines()[0]) for kind, text in outcomes] == [("error", STOPPED)] * 2
    assert (tmp_path / "checkpoint-3" / "rng_state_1.pth").is_file()
    run_ranks(2, train, argv)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_signal_during_a_validation(parts: Path, tmp_path: Path) -> None:
    held_out = {"eval_data_path": parts / "vqa" / "train.json", "eval_answers": 0}
    options = {**OPTIONS, **held_out, "eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 1}
    ((kind, text),) = start(1, train_and_signal, arguments(parts, tmp_path, **options), 2, "on_evaluate")
    assert kind == "error" and text.startswith(STOPPED)
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_without_the_option_a_signal_ends_the_run(parts: Path, tmp_path: Path) -> None:
    argv = arguments(parts, tmp_path, **{**OPTIONS, "save_on_signal": False})
    assert start(1, train_and_signal, argv, 2, "on_step_begin") == [("died", -signal.SIGTERM)]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_checkpoint_that_cannot_be_resumed_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="remove --save-only-model"):
        parse_training_args(arguments(parts, tmp_path, **OPTIONS, save_only_model=True))
