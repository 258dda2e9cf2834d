"""Throughput counts the sequences and tokens of every rank."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from llava.train.trainer import TrainingCounts
from tests.support.ranks import run_ranks


def add_up() -> tuple[int, float, int, int, list[list[float]]]:
    """Job: return the sums of counts that differ by rank."""
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    counts = TrainingCounts(2 + rank, 10.0 * (rank + 1), 100, 300 + rank)
    if rank == 1:  # the other rank had no row of any source since the last log
        counts.add_sources(torch.tensor([[0.5, 1.5], [2.0, 3.0]]))
    total = counts.over_ranks(torch.device("cpu"), 2)
    assert total.by_source is not None
    return total.sequences, total.supervised, total.tokens, total.unshared, total.by_source.tolist()


def test_counts_of_two_ranks() -> None:
    assert run_ranks(2, add_up) == [(5, 30.0, 200, 601, [[0.5, 1.5], [2.0, 3.0]])] * 2


def test_counts_of_one_process() -> None:
    assert TrainingCounts(2, 10.0, 100, 300).over_ranks(torch.device("cpu")) == TrainingCounts(2, 10.0, 100, 300)
