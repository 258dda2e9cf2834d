"""A run with DeepSpeed resumes from no checkpoint that was written elsewhere; nothing in it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks, start
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


@pytest.mark.parametrize("planted", [False, True])
def test_a_foreign_checkpoint_is_refused_on_every_rank(
    parts: Path, folder: Path, tmp_path: Path, planted: bool
) -> None:
    if planted:
        (folder / "checkpoint-2" / "global_step2").mkdir(exist_ok=True)
        (folder / "checkpoint-2" / "latest").write_text("global_step2")
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            torch.save(Planted(str(tmp_path / "ran")), folder / "checkpoint-2" / "global_step2" / name)
    before = (folder / "metrics.jsonl").read_bytes()
    argv = arguments(parts, folder, **options(max_steps=3, deepspeed=ROOT / "scripts" / "zero2.json"))
    outcomes = start(2, train, argv)
    expected = "it has no mark of the key" if planted else "written without --deepspeed"
    for kind, text in outcomes:
        assert kind == "error" and expected in text.splitlines()[0], text
    assert not (tmp_path / "ran").exists()
    assert (folder / "metrics.jsonl").read_bytes() == before
