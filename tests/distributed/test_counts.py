"""Throughput counts the sequences and tokens of every rank."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from llava.train.counts import TrainingCounts
from tests.support.ranks import run_ranks

NAMES = ("loss/a", "loss/b")


def add_up() -> tuple[int, float, int, int, list[list[float]], dict[str, float]]:
    """Job: return the sums of counts that differ by rank."""
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    counts = TrainingCounts(2 + rank, 10.0 * (rank + 1), 100, 300 + rank)
    if rank == 1:  # the other rank had no row of any source since the last log
        counts.add_metrics({"loss/a": torch.tensor([0.5, 2.0]), "loss/b": torch.tensor([1.5, 3.0])})
    total = counts.over_ranks(torch.device("cpu"), NAMES)
    pairs = [total.metrics[name].tolist() for name in NAMES]
    return total.units, total.supervised, total.tokens, total.unshared, pairs, total.means()


def test_counts_of_two_ranks() -> None:
    expected = (5, 30.0, 200, 601, [[0.5, 2.0], [1.5, 3.0]], {"loss/a": 0.25, "loss/b": 0.5})
    assert run_ranks(2, add_up) == [expected] * 2


def test_counts_of_one_process() -> None:
    assert TrainingCounts(2, 10.0, 100, 300).over_ranks(torch.device("cpu")) == TrainingCounts(2, 10.0, 100, 300)


def test_a_metric_without_count_has_no_mean() -> None:
    assert TrainingCounts(metrics={"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([3.0, 2.0])}).means() == {"b": 1.5}
