"""Preference losses and gradients against TRL's trainer, padded rows, and a plain loop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import logsigmoid

from benchmarks.dpo_throughput import assert_equal, compare, exact_errors
from benchmarks.pair_sides import BETA, TRL, WORKLOADS, Ours, Padded, PairBatch, Workload, random_pairs
from llava.train.objectives.pairs import PairLoss, PairLossSpec

WORK = Workload(2, 2, 7)
ONE_IMAGE = Workload(1, 2, 7)
TINY = {"shape": "tiny"}


@pytest.fixture(scope="module")
def trl() -> Iterator[TRL]:
    yield TRL(**TINY)


@pytest.mark.parametrize(
    "names",
    [("sigmoid",), ("ipo",), ("robust",), ("bco_pair",), ("hinge",), ("sigmoid_norm",), ("sigmoid", "bco_pair", "sft")],
)
def test_losses_and_gradients_are_those_of_trl(trl: TRL, names: tuple[str, ...]) -> None:
    weights = (0.8, 0.2, 1.0)[: len(names)]
    smoothing = 0.1 if names == ("robust",) else 0.0
    trl.trainer.loss_types, trl.trainer.loss_weights = list(names), list(weights)
    trl.trainer.label_smoothing = smoothing
    ours = Ours(**TINY)
    ours.objective = PairLoss(PairLossSpec(names, weights, BETA, smoothing), reference=ours.reference)
    scale = 1e2 if names == ("ipo",) else 1.0  # squares of a margin of 5
    work = WORK if names == ("sigmoid",) else ONE_IMAGE  # how images are shared does not depend on the loss
    assert_equal(ours, trl, random_pairs(work), loss=1e-5 * scale, gradients=3e-5)


def test_trees_equal_padded_rows_in_float64() -> None:
    assert max(exact_errors(WORK, "tiny")) < 1e-9
    one, other = Ours(**TINY, cached=True), Padded(**TINY, cached=True)
    assert_equal(one, other, one.with_reference(random_pairs(WORK)), loss=1e-5, gradients=1e-4)


def test_training_equals_a_plain_loop() -> None:
    """Five steps of AdamW: our objective on trees, and a loop that runs one padded row after another."""
    batch = random_pairs(WORK)
    ours, loop = Ours(**TINY, dtype=torch.float64), Padded(**TINY, dtype=torch.float64)
    losses: list[tuple[float, float]] = []
    optimizers = [torch.optim.AdamW([w for w in side.model.parameters() if w.requires_grad], lr=1e-2)
                  for side in (ours, loop)]  # fmt: skip
    for _ in range(5):
        own = ours.backward(batch)
        total = 0.0
        for unit in batch.units:
            inputs = loop.inputs(PairBatch([unit], batch.images))
            with torch.no_grad(), loop.model.disable_adapter():
                reference = loop.logps(inputs)
            chosen, rejected = loop.logps(inputs) - reference
            loss = -logsigmoid(BETA * (chosen - rejected)) / len(batch.units)
            loss.backward()
            total += float(loss.item())
        losses.append((own, total))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for own, other in losses:
        assert own == pytest.approx(other, abs=1e-9)
    assert losses[-1][0] < losses[0][0]


@pytest.mark.extended
def test_the_benchmark_runs_at_a_tiny_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "5p30", Workload(1, 2, 5))
    ratios = compare("5p30", 1, shape="tiny")
    assert set(ratios) == {"dpo_5p30_trl", "dpo_5p30_padded", "dpo_5p30_cached"} and min(ratios.values()) > 0
    printed = capsys.readouterr().out
    assert "tokens, padded / tree: 3.56" in printed and "equal to TRL in float32" in printed
