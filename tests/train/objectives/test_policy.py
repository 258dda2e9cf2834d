"""Policy losses: equal to TRL's on the same ids, the same with and without sharing, and their counts."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava.data.encode import Encoded
from llava.data.flat_batch import FlatBatch, Layout, flatten
from llava.train import losses
from llava.train.objectives.policy import PolicyLoss, PolicyLossSpec
from tests.support.tiny import tiny_llava

G, VOCABULARY = 4, 23


def dialogues(num: int = 2 * G, *, seed: int = 0, columns: tuple[str, ...] = ("old", "reference")) -> list[Encoded]:
    """Return dialogues of two groups with the same first question, of two turns with random answers."""
    draw = random.Random(seed)
    found = []
    for index in range(num):
        ids, labels, turns = [1, 5, 6 + index // G], [-100] * 3, [0] * 3
        for turn in range(2):
            for _ in range(draw.randrange(1, 5)):
                ids.append(draw.randrange(5, VOCABULARY))
                labels.append(ids[-1])
                turns.append(2 * turn + 1)
            ids += [7, 8]
            labels += [-100] * 2
            turns += [2 * turn + 2] * 2
        # The advantage of a sequence is one number, as in TRL.
        named = {"advantage": [draw.gauss(0, 1)] * len(ids), "engine": [draw.gauss(-3, 0.1) for _ in ids]}
        named |= {name: [draw.gauss(-3, 0.3) for _ in ids] for name in columns}
        rounded = {name: tuple(np.float32(numbers).tolist()) for name, numbers in named.items()}
        found.append(Encoded(tuple(ids), tuple(labels), tuple(turns), columns=rounded))
    return found


def row(sequences: list[Encoded], layout: Layout = "tree") -> FlatBatch:
    return flatten(sequences, {}, image_token_id=0, layout=layout, unit_sizes=[G] * (len(sequences) // G))


def with_logits(batch: FlatBatch, seed: int = 1) -> tuple[Any, Tensor]:
    """Return a model that gives fixed logits, and its logits [1, M, V]."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(1, len(batch.predictor), VOCABULARY, generator=generator) * 0.3).requires_grad_()
    return lambda **_: SimpleNamespace(logits=logits), logits


def padded(batch: FlatBatch, values: Tensor, fill: float = 0.0) -> Tensor:
    """Return values of edges [E] as [B, T]."""
    parts = [values[batch.edge_sequence == k] for k in range(batch.num_sequences)]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


def trl_loss(trainer: type, batch: FlatBatch, logits: Tensor, spec: PolicyLossSpec, **settings: Any) -> Tensor:
    """Return the loss that a trainer of TRL computes from the log-probabilities of the same ids."""
    logprobs = losses.token_logprobs(logits[0], batch.target_ids)[batch.edge_target]
    columns = batch.edge_values
    mask = padded(batch, torch.ones_like(logprobs))
    own = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(batch, logprobs), torch.zeros_like(mask), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=spec.kl_coef,
        importance_sampling_level="token", use_vllm=False, epsilon_low=spec.clip_low, epsilon_high=spec.clip_high,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)), max_completion_length=spec.max_length, **settings,
    )  # fmt: skip
    first = torch.stack([columns["advantage"][batch.edge_sequence == k][0] for k in range(batch.num_sequences)])
    old = padded(batch, columns["old"])
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1), "prompt_mask": torch.ones(len(mask), 1),
        "completion_ids": torch.zeros_like(mask), "completion_mask": mask, "advantages": first,
        "old_per_token_logps": old, "ref_per_token_logps": padded(batch, columns["reference"]),
        "old_logps": (old * mask).sum(1), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    found: Tensor = trainer._compute_loss(own, None, inputs)  # type: ignore[attr-defined]
    return found


def loss_of(objective: PolicyLoss, batch: FlatBatch, model: Any) -> Tensor:
    num_items = objective.count(batch).float().clamp(min=1)
    return objective(model, batch, num_items=num_items).loss


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize(
    ("aggregation", "loss_type"), [("token", "dapo"), ("sequence", "grpo"), ("constant", "dr_grpo"), ("token", "bnpo")]
)
def test_grpo_equals_trl(aggregation: str, loss_type: str, kl_coef: float) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    spec = PolicyLossSpec(aggregation=aggregation, clip_high=0.28, kl_coef=kl_coef, max_length=9)
    batch = row(dialogues())
    model, logits = with_logits(batch)
    ours = loss_of(PolicyLoss(spec, without=None), batch, model)
    theirs = trl_loss(GRPOTrainer, batch, logits, spec, loss_type=loss_type)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5) and abs(ours.item()) > 1e-3
    [mine], [other] = torch.autograd.grad(ours, logits, retain_graph=True), torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_rloo_equals_trl() -> None:
    from trl.trainer.rloo_trainer import RLOOTrainer

    spec = PolicyLossSpec(ratio="sequence")
    batch = row(dialogues())
    model, logits = with_logits(batch)
    ours, theirs = loss_of(PolicyLoss(spec, without=None), batch, model), trl_loss(RLOOTrainer, batch, logits, spec)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5) and abs(ours.item()) > 1e-3
    [mine], [other] = torch.autograd.grad(ours, logits, retain_graph=True), torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_ppo_equals_loops() -> None:
    spec = PolicyLossSpec(value_coef=0.1, clip_low=0.1, clip_high=0.1, clip_value=0.05)
    batch = row(dialogues(columns=("old", "value", "return")))
    _, logits = with_logits(batch)
    values = torch.randn(1, len(batch.predictor), generator=torch.Generator().manual_seed(3))
    found = loss_of(PolicyLoss(spec, without=None), batch, lambda **_: SimpleNamespace(logits=logits, values=values))
    total, columns = 0.0, {name: column.tolist() for name, column in batch.edge_values.items()}
    scores = logits.detach()[0].double().numpy()
    for edge, target in enumerate(batch.edge_target.tolist()):
        z = scores[target]
        logprob = z[batch.target_ids[target]] - np.log(np.exp(z).sum())
        ratio, a = np.exp(logprob - columns["old"][edge]), columns["advantage"][edge]
        total += max(-ratio * a, -min(max(ratio, 0.9), 1.1) * a)
        value, old, goal = values[0, target].item(), columns["value"][edge], columns["return"][edge]
        near = min(max(value, old - 0.05), old + 0.05)
        total += 0.1 * 0.5 * max((value - goal) ** 2, (near - goal) ** 2)
    assert found.item() == pytest.approx(total / len(batch.edge_target), abs=1e-5)


@pytest.mark.parametrize("spec", [
    PolicyLossSpec(clip_high=0.28, kl_coef=0.04),
    PolicyLossSpec(ratio="sequence"),
    PolicyLossSpec(value_coef=0.5),
], ids=["grpo", "rloo", "ppo"])  # fmt: skip
def test_sharing_changes_neither_loss_nor_gradient(spec: PolicyLossSpec) -> None:
    from llava.model.value_head import ActorCritic, ValueModel, shared_copy

    network = tiny_llava().model
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for parameter in network.model.language_model.parameters():
        parameter.requires_grad_(True)
    critic = ActorCritic(network, ValueModel(shared_copy(network)))
    torch.nn.init.normal_(critic.value.head.linear.weight)  # type: ignore[union-attr]
    model = critic if spec.value_coef is not None else network
    columns = ("reference", "value", "return")
    results = {}
    for layout in ("tree", "flat", "padded"):
        batch = row(dialogues(columns=columns), layout)  # type: ignore[arg-type]
        model.zero_grad()
        loss = loss_of(PolicyLoss(spec, without=3), batch, model)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results[layout] = (loss.item(), gradients)
    largest = max(gradient.norm() for gradient in results["padded"][1].values())
    for layout in ("tree", "flat"):
        assert results[layout][0] == pytest.approx(results["padded"][0], abs=1e-5)
        assert results[layout][1].keys() == results["padded"][1].keys()
        for name, gradient in results["padded"][1].items():
            assert (results[layout][1][name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-4 * largest), name


def test_an_excluded_token_has_no_probability_and_temperature_divides() -> None:
    sequences = [replace(sequence, columns={"advantage": sequence.columns["advantage"]}) for sequence in dialogues()]
    batch = row(sequences)
    model, logits = with_logits(batch)
    loss_of(PolicyLoss(PolicyLossSpec(temperature=2.0), without=3), batch, model).backward()
    assert logits.grad is not None and logits.grad[0, :, 3].abs().max() == 0
    output = PolicyLoss(PolicyLossSpec(temperature=2.0), without=3)(model, batch, num_items=torch.ones(1))
    scores = (logits.detach()[0] / 2)[:, [i for i in range(VOCABULARY) if i != 3]]
    expected = torch.distributions.Categorical(logits=scores).entropy()[batch.edge_target].mean()
    assert output.metrics["entropy"][0] / output.metrics["entropy"][1] == pytest.approx(expected.item(), abs=1e-5)


def test_counts_are_of_tokens_sequences_or_padded_lengths() -> None:
    sequences = [replace(sequence, numbers={"length": 11.0}) for sequence in dialogues()]
    batch = row(sequences)
    num_tokens = sum(label >= 0 for sequence in sequences for label in sequence.labels)
    counts = {
        spec: PolicyLoss(spec, without=None).count(batch).item()
        for spec in (
            PolicyLossSpec(),
            PolicyLossSpec(ratio="sequence"),
            PolicyLossSpec(aggregation="constant", max_length=5),
            PolicyLossSpec(counts_padding=True),
        )
    }
    assert list(counts.values()) == [num_tokens, 2 * G, 2 * G, 11.0 * 2 * G]
    idle = replace(batch, sequence_unit=torch.full_like(batch.sequence_unit, -1))
    assert PolicyLoss(PolicyLossSpec(), without=None).count(idle).item() == 0
