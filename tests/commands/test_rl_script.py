"""`scripts/train_rl_model.sh` as a whole on tiny parts: the published values, smaller where a laptop needs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.conftest import ROOT
from tests.support.processes import run_command
from tests.support.rollouts import rollouts, write_toy
from tests.support.runs import metrics

SMALLER = (
    "--rollout_batch_size 4 --step_batch_size 2 --rollout_per_device_batch_size 4 --step_per_device_batch_size 2 "
    "--response_len 2 --lora_r 4 --report_to none --version vicuna_v1 --bf16 False --disable_tqdm True --max_steps 1"
)
"""Options of a laptop and tiny parts; all others are the script's."""


def test_the_published_command_rolls_out_and_learns(tmp_path: Path) -> None:
    parts, out = write_toy(tmp_path), tmp_path / "out"
    words = [parts / "lm", parts / "rules.yaml", parts / "table.json", parts / "images", out, *SMALLER.split()]
    words += ["--vision_tower", parts / "tower"]
    bin_folder = ROOT / ".venv" / "bin"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
    command = ["bash", str(ROOT / "scripts" / "train_rl_model.sh"), *map(str, words)]
    done = run_command(command, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("without effect, since the reward is symbolic") == 1
    rows = rollouts(out)
    assert len(rows) == 4 and {row["step"] for row in rows} == {1}
    losses = [line for line in metrics(out) if "loss" in line]
    assert losses[-1]["step"] == 4  # two updates, twice
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    assert (out / "value_model.safetensors").is_file() or (out / "value").is_dir()
