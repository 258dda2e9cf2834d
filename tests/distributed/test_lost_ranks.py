"""If a rank runs out of memory, every rank prints one line and ends with an error."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llava.errors import LlavaError
from llava.train.objectives.sft import OBJECTIVES, SFT
from llava.train.ranks import lost_ranks_in_one_line
from llava.utils.cli import run_program
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, train, write_parts


class Failing(SFT):
    """Objective that runs out of memory in the second row of some ranks."""

    ranks: tuple[int, ...]
    num_calls = 0

    def __call__(self, model: Any, batch: Any, *, num_items: torch.Tensor) -> Any:
        self.num_calls += 1
        if self.num_calls == 2 and dist.get_rank() in self.ranks:
            raise torch.OutOfMemoryError("simulated")
        return super().__call__(model, batch, num_items=num_items)


def train_out_of_memory(argv: list[str], ranks: tuple[int, ...]) -> tuple[object, str]:
    """Job: run a training program; return its exit status and the end of its error stream."""
    OBJECTIVES["sft"] = type("Failing", (Failing,), {"ranks": ranks})
    errors = io.StringIO()
    with pytest.raises(SystemExit) as ended, redirect_stderr(errors):
        run_program(lambda: train(argv))
    return ended.value.code, errors.getvalue()[errors.getvalue().index("llava: error: ") :]


@pytest.mark.parametrize("failing", [(0, 1), (1,)], ids=["both", "one"])
def test_every_rank_ends_with_one_line(tmp_path: Path, failing: tuple[int, ...]) -> None:
    argv = arguments(write_parts(tmp_path / "parts"), tmp_path / "run", per_device_train_batch_size=2)
    for rank, (status, text) in enumerate(run_ranks(2, train_out_of_memory, argv, failing)):
        (line,) = text.splitlines()
        expected = "lower --max-tokens-per-row" if rank in failing else "another rank of this run has ended"
        assert status == 2 and expected in line


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ") as caught, lost_ranks_in_one_line():
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, LlavaError)
    with pytest.raises(LlavaError, match="another rank"), lost_ranks_in_one_line():
        raise dist.DistBackendError("NCCL error: remote process exited")
