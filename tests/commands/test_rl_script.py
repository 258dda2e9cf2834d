"""`scripts/train_rl_model.sh` as a whole on tiny parts: the published values, smaller where a laptop needs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.support.processes import run_command
from tests.support.rollouts import rollouts, write_toy
from tests.support.runs import losses, metrics, saved

SMALLER = (
    "--rollout_batch_size 4 --step_batch_size 2 --rollout_per_device_batch_size 4 --step_per_device_batch_size 2 "
    "--response_len 2 --lora_r 4 --report_to none --version vicuna_v1 --bf16 False --disable_tqdm True --max_steps 1"
)
"""Options of a laptop and tiny parts; all others are the script's."""


def run(python: Path, parts: Path, out: Path, *more: str, processes: int = 1) -> str:
    """Run the script; return its messages."""
    words = [parts / "lm", parts / "rules.yaml", parts / "table.json", parts / "images", out, *SMALLER.split(), *more]
    words += ["--vision_tower", parts / "tower"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PATH": f"{python.parent}:{environment['PATH']}", "NPROC": str(processes)}
    command = ["bash", str(ROOT / "scripts" / "train_rl_model.sh"), *map(str, words)]
    done = run_command(command, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_the_published_command_rolls_out_and_learns(tmp_path: Path, python: Path) -> None:
    parts, out = write_toy(tmp_path), tmp_path / "out"
    messages = run(python, parts, out)
    assert messages.count("without effect, since the reward is symbolic") == 1
    rows = rollouts(out)
    assert len(rows) == 4 and {row["step"] for row in rows} == {1}
    lines = [line for line in metrics(out) if "loss" in line]
    assert lines[-1]["step"] == 4  # two updates, twice
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    assert (out / "value_model.safetensors").is_file() or (out / "value").is_dir()


def test_two_processes_equal_one(tmp_path: Path, python: Path) -> None:
    """Both ask the same cases, draw the same answers and learn the same; statistics are over all processes."""
    parts = write_toy(tmp_path)
    for processes in (1, 2):
        run(python, parts, tmp_path / str(processes), "--max_steps", "2", "--warmup_steps", "0", processes=processes)
    one, two = (rollouts(tmp_path / str(processes)) for processes in (1, 2))
    names = ("step", "case", "group", "sample", "seed", "asked", "answers", "raw", "total")
    assert len(one) == 8 and [[row[name] for name in names] for row in one] == [
        [row[name] for name in names] for row in two
    ]
    for ours, theirs in zip(one, two, strict=True):
        assert ours["advantages"] == pytest.approx(theirs["advantages"], abs=1e-3)
    for name in ("loss", "grad_norm", "kl", "entropy"):
        first, second = (losses(tmp_path / str(processes), name) for processes in (1, 2))
        assert len(first) > 1 and second == pytest.approx(first, rel=1e-3, abs=1e-4), name
    first, second = (saved(tmp_path / str(processes)) for processes in (1, 2))
    for name, weight in first.items():  # Adam divides even the smallest gradient by its size
        torch.testing.assert_close(second[name], weight, atol=2e-4, rtol=1e-4)
