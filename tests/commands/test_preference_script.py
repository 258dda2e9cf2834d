"""`scripts/dpo_finetune.sh` as a whole on tiny parts: the published command line trains, saves and can be repeated."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.pairs import write_pairs
from tests.support.processes import run_command
from tests.support.runs import metrics, write_parts

SMALLER = (
    "--use_cpu True --bf16 False --tf32 False --report_to none --gradient_accumulation_steps 1 "
    "--lora_r 4 --lora_r_vit 4"
)
"""Options of a machine without GPU; all others are the script's."""


def test_the_published_command_trains_pairs(tmp_path: Path, python: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    pairs = write_pairs(tmp_path / "pairs", 8)
    out = tmp_path / "out"
    words = [parts / "lm", parts / "tower", "", pairs, pairs.parent / "images", out]
    words += [*SMALLER.split(), "--dataloader_num_workers", "0", "--model_max_length", "512"]
    environment = {**os.environ, "LAUNCH": str(python), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "scripts" / "dpo_finetune.sh"), *map(str, words)]
    done = run_command(command, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = metrics(out)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and len(found) >= 2
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    assert (out / "reference-0.jsonl").is_file()
