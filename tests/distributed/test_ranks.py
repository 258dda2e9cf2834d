"""One rank and two ranks with one global batch give equal results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.runs import arguments, losses, saved, train, write_uneven


def row_ids(output: Path) -> Counter[int]:
    lines = [line for file in output.glob("row_ids*.jsonl") for line in file.read_text().splitlines()]
    return Counter(number for line in lines for number in json.loads(line)["rows"])


@pytest.mark.parametrize("limit", [pytest.param(8192, marks=pytest.mark.extended), 60])
def test_two_ranks_equal_one(parts: Path, tmp_path: Path, limit: int) -> None:
    """Rows of 1 to 60 trained tokens, some without images; in the last step of 9 rows one rank has none."""
    data = write_uneven(tmp_path)
    common = {"data_path": data, "image_folder": tmp_path / "images", "num_train_epochs": 2, "log_row_ids": True}
    common |= {"max_tokens_per_row": limit}
    one = tmp_path / "one"
    two = tmp_path / "two"
    run_ranks(1, train, arguments(parts, one, per_device_train_batch_size=4, **common))
    run_ranks(2, train, arguments(parts, two, per_device_train_batch_size=2, **common))
    assert losses(one) == pytest.approx(losses(two), rel=2e-5) and len(losses(one)) == 6
    assert losses(one, "grad_norm") == pytest.approx(losses(two, "grad_norm"), rel=2e-4)
    first, second = saved(one), saved(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=2e-4, rtol=1e-3, msg=name)
    assert row_ids(one) == row_ids(two) == Counter({row: 2 for row in range(9)})


def test_micro_batches_of_two_ranks_are_those_of_one(parts: Path, tmp_path: Path) -> None:
    """The mean of micro-batch means does not depend on the ranks; the last step has one row."""
    data = write_uneven(tmp_path)
    common = {"data_path": data, "image_folder": tmp_path / "images", "per_device_train_batch_size": 2}
    common |= {"loss_normalization": "micro_batches"}
    run_ranks(1, train, arguments(parts, tmp_path / "one", gradient_accumulation_steps=2, **common))
    run_ranks(2, train, arguments(parts, tmp_path / "two", **common))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=2e-5)
    assert len(losses(tmp_path / "one")) == 3
    second = saved(tmp_path / "two")
    for name, tensor in saved(tmp_path / "one").items():
        torch.testing.assert_close(tensor, second[name], atol=2e-4, rtol=1e-3, msg=name)
