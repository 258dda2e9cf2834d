"""A run with DeepSpeed or FSDP resumes from no checkpoint that was written elsewhere; nothing in it is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import allow_fsdp_on_cpu, run_ranks, start
from tests.support.runs import arguments, train

ROOT = Path(__file__).resolve().parents[2]


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def folder(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with a checkpoint, into which somebody else puts files for DeepSpeed."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, train, arguments(parts, folder, **options()))
    return folder


def options(**changed: object) -> dict[str, Any]:
    return {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 2, **changed}


DEEPSPEED = (
    "latest",
    "global_step2/mp_rank_00_model_states.pt",
    "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt",
)
FSDP = ("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "pytorch_model_fsdp.bin", "optimizer.bin")
ZERO = {number: {"deepspeed": ROOT / "scripts" / f"zero{number}.json"} for number in (2, 3)}
FULL: dict[str, Any] = {"fsdp": "full_shard"}
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "zero 2": (ZERO[2], (), "written without --deepspeed"),
    "zero 3": (ZERO[3], (), "written without --deepspeed"),
    "zero 2, planted": (ZERO[2], DEEPSPEED, "it has no mark of the key"),
    "zero 3, planted": (ZERO[3], DEEPSPEED, "it has no mark of the key"),
    "zero 2, planted states": (ZERO[2], DEEPSPEED[2:], "it has no mark of the key"),
    "fsdp": (FULL, (), "it has no mark of the key"),
    "fsdp, planted shards": (FULL, FSDP[:2], "it has no mark of the key"),
    "fsdp, planted files": (FULL, FSDP[2:], "it has no mark of the key"),
    "fsdp by layers, planted": ({"fsdp": "shard_grad_op auto_wrap"}, FSDP, "it has no mark of the key"),
}


def train_sharded(argv: list[str]) -> None:
    """Job: a run that may shard its weights without GPUs."""
    if "--fsdp" in argv:
        allow_fsdp_on_cpu()
    train(argv)


@pytest.mark.parametrize("name", CASES)
def test_a_foreign_checkpoint_is_refused_on_every_rank(parts: Path, folder: Path, tmp_path: Path, name: str) -> None:
    sharding, planted, expected = CASES[name]
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    for file in planted:
        (run / "checkpoint-2" / file).parent.mkdir(exist_ok=True)
        with (run / "checkpoint-2" / file).open("wb") as stream:
            torch.save(Planted(str(tmp_path / "ran")), stream)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcomes = start(2, train_sharded, arguments(parts, run, **options(max_steps=3, **sharding)))
    for kind, text in outcomes:
        assert kind == "error" and expected in text.splitlines()[0], text
    assert not (tmp_path / "ran").exists()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
