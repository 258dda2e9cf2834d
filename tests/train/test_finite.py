"""Non-finite losses, gradients and weights stop every rank; saved checkpoints stay; step and rows are named."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from llava.errors import CheckpointError, ConfigError, LlavaError
from llava.train import run as training
from llava.train.objectives.base import ObjectiveOutput
from llava.train.objectives.sft import OBJECTIVES, SFT
from llava.train.parsing import parse_training_args
from llava.train.ranks import check_finite
from llava.train.train import main
from llava.utils.cli import run_program
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, steps, train, write_parts

STEP = 2
"""Step whose loss or gradients are not finite; a step is one row, hence one call of the objective."""


class NonFinite(SFT):
    """Objective with a non-finite loss, or gradient of a finite loss, in the second step of one rank."""

    name = "loss"
    rank = 0
    num_calls = 0
    model: nn.Module

    def __call__(self, model: Any, batch: Any, *, num_items: Tensor) -> ObjectiveOutput:
        output = super().__call__(model, batch, num_items=num_items)
        type(self).num_calls += 1
        type(self).model = model
        if self.num_calls != STEP or self.rank != int(os.environ.get("RANK", "0")):
            return output
        if self.name == "loss":
            return ObjectiveOutput(output.loss * float("inf"))
        weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        return ObjectiveOutput(output.loss + (weight.sum() * 0.0).sqrt())  # 0, whose gradient is infinity times 0


def stopped(argv: list[str], name: str, rank: int) -> tuple[str, bool, int]:
    """Job: a run that stops; return its message, whether all weights are finite, and the number of computed steps."""
    kind = type("Chosen", (NonFinite,), {"name": name, "rank": rank})
    usual, OBJECTIVES["sft"] = OBJECTIVES["sft"], kind
    try:
        with pytest.raises(LlavaError) as caught:
            train(argv)
    finally:
        OBJECTIVES["sft"] = usual
    is_finite = all(bool(weight.isfinite().all()) for weight in kind.model.parameters())  # type: ignore[attr-defined]
    return str(caught.value), is_finite, kind.num_calls  # type: ignore[attr-defined]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
@pytest.mark.parametrize(("name", "value"), [("loss", "inf"), ("gradient norm", "nan")])
def test_one_rank_stops(parts: Path, tmp_path: Path, name: str, value: str, max_grad_norm: float) -> None:
    argv = arguments(parts, tmp_path, max_grad_norm=max_grad_norm)
    message, is_finite, num_calls = stopped(argv, name, 0)
    assert message.startswith(f"step {STEP}, rank 0: the {name} is {value}; expected a finite value")
    assert is_finite and num_calls == STEP


def test_two_ranks_stop_with_the_message_of_one(tmp_path: Path) -> None:
    argv = arguments(write_parts(tmp_path / "parts"), tmp_path / "run", per_device_train_batch_size=2)
    first, second = run_ranks(2, stopped, argv, "loss", 1)
    assert first == second
    message, is_finite, num_calls = first
    assert message.startswith(f"step {STEP}, rank 1: the loss is inf")
    assert is_finite and num_calls == STEP


def test_finite_values_pass() -> None:
    check_finite(torch.tensor(3.0), torch.tensor(0.0), step=1)
    check_finite(torch.tensor(3.0), None, step=1)


def test_the_loss_alone_is_checked_without_a_norm() -> None:
    with pytest.raises(LlavaError, match="step 7, rank 0: the loss is nan"):
        check_finite(torch.tensor(float("nan")), None, step=7)


def row_numbers(message: str) -> list[int]:
    """Return the row numbers that a message names."""
    return [int(number) for number in re.findall(r"(\d+) \('", message)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12])
def test_the_rows_of_the_step_are_named(
    parts: Path, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By file, number and id, without their texts."""
    monkeypatch.setattr("tests.train.test_finite.STEP", 1)
    argv = arguments(parts, tmp_path, per_device_train_batch_size=size, log_row_ids=True, max_steps=2)
    message, _, _ = stopped(argv, "loss", 0)
    logged = [json.loads(line) for line in (tmp_path / "row_ids-0.jsonl").read_text().splitlines()]
    rows = json.loads((parts / "vqa" / "train.json").read_text())
    assert "train.json, rows " in message and row_numbers(message) == logged[0]["rows"]
    assert all(f"('{rows[number]['id']}')" in message for number in logged[0]["rows"])
    assert not any(turn["value"] in message for row in rows for turn in row["conversations"] if len(turn["value"]) > 3)


def test_rows_of_every_rank_are_named_for_gradients(tmp_path: Path) -> None:
    """They are summed over ranks, so that each may have caused the value."""
    argv = arguments(write_parts(tmp_path / "parts"), tmp_path / "run", per_device_train_batch_size=2)
    first, second = run_ranks(2, stopped, argv, "gradient norm", 1)
    assert first[0] == second[0] and "rank 0: " in first[0] and "rank 1: " in first[0]
    assert len(set(row_numbers(first[0]))) == 4


class Spoiled(TrainerCallback):
    """Callback that makes a trained weight non-finite after a step, on every rank."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == self.step:
            trained = [weight for weight in keywords["model"].parameters() if weight.requires_grad]
            with torch.no_grad():
                trained[-1].view(-1)[-1] = self.value


def spoiled(argv: list[str], step: int, value: float) -> str:
    """Job: a run whose weights become non-finite after a step; return its message."""
    make = training.make_trainer

    def with_callback(*args: Any, **keywords: Any) -> Any:
        trainer = make(*args, **keywords)
        trainer.add_callback(Spoiled(step, value))
        return trainer

    training.make_trainer = with_callback
    try:
        with pytest.raises(LlavaError) as caught:
            train(argv)
    finally:
        training.make_trainer = make
    return str(caught.value)


LIMITED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


@pytest.mark.parametrize(("step", "value", "changed"), [
    (2, "nan", LIMITED),
    (3, "inf", LIMITED),
    pytest.param(3, "-inf", {"save_strategy": "epoch", "save_total_limit": 1}, marks=pytest.mark.extended),
    (3, "nan", {"save_strategy": "no"}),
    pytest.param(2, "inf", {**LIMITED, "tune_mm_mlp_adapter": True}, marks=pytest.mark.extended),
    (2, "nan", {**LIMITED, "lora_enable": True, "lora_r": 2}),
])  # fmt: skip
def test_non_finite_weights_are_never_saved(
    parts: Path, tmp_path: Path, step: int, value: str, changed: dict[str, object]
) -> None:
    kept = [f"checkpoint-{step - 1}"] if "save_steps" in changed else []
    argv = arguments(parts, tmp_path, **changed)
    message = spoiled(argv, step, float(value))
    assert message.startswith(f"step {step}, rank 0: weight ") and "is not finite" in message
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == kept
    files = list(tmp_path.rglob("*.safetensors"))
    assert all(bool(tensor.isfinite().all()) for file in files for tensor in load_file(file).values())
    assert {file.parent.name for file in files} == set(kept), "the final model is not written either"
    train(argv)
    assert steps(tmp_path) == [1, 2, 3], "the same command resumes"


def test_two_ranks_keep_the_last_finite_checkpoint(tmp_path: Path) -> None:
    changed = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "per_device_train_batch_size": 2}
    argv = arguments(write_parts(tmp_path / "parts"), tmp_path / "run", **changed)
    first, second = run_ranks(2, spoiled, argv, 2, float("nan"))
    assert first == second and first.startswith("step 2, rank 0: weight ")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("part", ["lm", "tower"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_starts_with_non_finite_weights_is_refused(tmp_path: Path, part: str, value: float) -> None:
    parts = write_parts(tmp_path / "parts")
    spoil(parts / part / "model.safetensors", value)
    with pytest.raises(CheckpointError, match="not finite"):
        train(arguments(parts, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def spoil(file: Path, value: float) -> None:
    weights = load_file(file)
    next(tensor for name, tensor in weights.items() if name.endswith("weight")).view(-1)[0] = value
    save_file(weights, file, {"format": "pt"})


def test_a_checkpoint_with_non_finite_weights_is_not_resumed(parts: Path, tmp_path: Path) -> None:
    words = {"save_strategy": "steps", "save_steps": 1}
    train(arguments(parts, tmp_path, **words, max_steps=2))
    spoil(tmp_path / "checkpoint-2" / "model.safetensors", float("nan"))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: .* not finite"):
        train(arguments(parts, tmp_path, **words, max_steps=3))


def test_a_non_finite_validation_loss_stops(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.train.run.HeldOutLoss.__call__", lambda self, model: {"eval_loss": float("nan")})
    words = {"eval_data_path": parts / "vqa" / "train.json", "eval_answers": 0, "save_strategy": "epoch"}
    with pytest.raises(LlavaError, match="step 3: the validation loss is nan"):
        train(arguments(parts, tmp_path, **words))


@pytest.mark.parametrize(("size", "changed"), [
    (1, {}), (2, {}), (4, {}), (2, {"unfreeze_mm_vision_tower": True}), (2, {"lora_enable": True, "lora_r": 2}),
])  # fmt: skip
def test_the_command_ends_with_one_line_and_status_2(
    parts: Path, tmp_path: Path, size: int, changed: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate that is far too high, without clipping: the checkpoint before the end is finite."""
    high = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **LIMITED, **changed}
    argv = arguments(parts, tmp_path, per_device_train_batch_size=size, num_train_epochs=4, **high)
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: main(argv))
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "finite" in line]
    assert re.search(r"step \d+, rank 0: (weight .* is not finite|the .* expected a finite value)", line)
    weights = [tensor for file in tmp_path.rglob("*.safetensors") for tensor in load_file(file).values()]
    assert all(bool(tensor.isfinite().all()) for tensor in weights)


@pytest.mark.parametrize("name", ["learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "vision_tower_lr"])
@pytest.mark.parametrize("rate", ["nan", "inf", "-1", "1e38"])
def test_a_rate_that_no_optimizer_takes_is_refused(parts: Path, tmp_path: Path, name: str, rate: str) -> None:
    with pytest.raises(ConfigError, match=r"-(learning-rate|lr) is .*; expected a number from 0 to 1e\+30"):
        parse_training_args(arguments(parts, tmp_path, **{name: rate}))


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "num_train_epochs": ["nan", "inf", "-1"],
        "weight_decay": ["nan", "inf", "-1"],
        "max_grad_norm": ["nan", "-1"],
        "seed": ["-1", str(2**32)],
        "per_device_train_batch_size": ["0", "-1"],
        "per_device_eval_batch_size": ["0"],
        "gradient_accumulation_steps": ["0", "-4"],
        "dataloader_num_workers": ["-1"],
    }.items(),
)
def test_a_number_that_no_run_can_have_is_refused_by_the_name_of_its_option(
    parts: Path, tmp_path: Path, name: str, values: list[str]
) -> None:
    for value in values:
        match = rf"--{name.replace('_', '-')} is .*; expected a number (from [01]|above 0) to \d"
        with pytest.raises(ConfigError, match=match):
            parse_training_args(arguments(parts, tmp_path, **{name: value}))
    assert not list(tmp_path.iterdir())


def test_the_smallest_and_largest_numbers_are_taken(parts: Path, tmp_path: Path) -> None:
    given = {"seed": 2**32 - 1, "per_device_train_batch_size": 1, "weight_decay": 0, "max_grad_norm": 0}
    parsed = parse_training_args(arguments(parts, tmp_path, **given))
    assert {name: getattr(parsed.training, name) for name in given} == given
