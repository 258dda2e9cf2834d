"""`llava train --nproc 2` is torchrun with two processes: equal losses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.ports import free_ports
from tests.support.processes import run_command
from tests.support.runs import arguments, losses, write_parts

ROOT = Path(__file__).resolve().parents[2]


def run(words: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = run_command(words, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.extended
def test_the_losses_are_those_of_torchrun(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    options: dict[str, object] = {"max_steps": 3, "per_device_train_batch_size": 2, "seed": 3}
    command, ports = [sys.executable, "-m", "llava.cli", "train"], free_ports(2)
    run([*command, *arguments(parts, tmp_path / "ours", **options), "--nproc", "2", "--master-port", str(ports[0])])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={ports[1]}"]
    run([*torchrun, "-m", "llava.cli", "train", *arguments(parts, tmp_path / "theirs", **options)])
    found = losses(tmp_path / "ours")
    assert len(found) == 3 and found == losses(tmp_path / "theirs")
