"""Value models: zero at the start, weights of their own on shared frozen ones, saved and restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava.data.encode import Encoded
from llava.data.flat_batch import flatten
from llava.errors import CheckpointError
from llava.model import lora
from llava.model.builder import LoadedModel
from llava.model.value_head import (
    VALUE_FILE,
    ActorCritic,
    ValueHead,
    ValueModel,
    restore_value,
    save_value,
    shared_copy,
)
from tests.support.tiny import tiny_llava

SEQUENCES = [Encoded((1, 5, 6, 7 + i), (-100, -100, 6, 7 + i), (0, 0, 1, 1)) for i in range(2)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_llava()


@pytest.fixture
def policy(loaded: LoadedModel) -> nn.Module:
    """A network with an adapter that changes something."""
    network = lora.add_lora(tiny_llava(), r=2, dropout=0.0)
    lora.freeze_for(network, freeze_projector=True, has_adapter=True)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return network


def inputs(layout: Any = "tree") -> dict[str, Any]:
    return flatten(SEQUENCES, {}, image_token_id=4, layout=layout).model_inputs()


def test_a_head_is_zero_at_the_start_and_learns() -> None:
    head = ValueHead(8)
    hidden = torch.randn(3, 8)
    assert head(hidden).abs().max() == 0
    head(hidden).sum().backward()
    assert head.linear.weight.grad is not None and head.linear.weight.grad.abs().max() > 0


def test_a_copy_shares_frozen_weights_only(policy: nn.Module) -> None:
    other = shared_copy(policy)
    pairs = list(zip(policy.named_parameters(), other.parameters(), strict=True))
    assert all((ours is theirs) != ours.requires_grad for (_, ours), theirs in pairs)
    assert any(ours.requires_grad for (_, ours), _ in pairs)


@pytest.mark.parametrize("kind", ["adapter", "head"])
def test_the_policy_of_an_actor_critic_is_the_policy(policy: nn.Module, kind: str) -> None:
    critic = ActorCritic(policy, ValueModel(shared_copy(policy)) if kind == "adapter" else None)
    with torch.no_grad():
        output, expected = critic(**inputs()), policy(**inputs()).logits
        torch.testing.assert_close(output.logits, expected)
        assert output.values.shape == expected.shape[:2] and output.values.abs().max() == 0
        torch.testing.assert_close(critic.values(**inputs()), output.values)


def test_values_are_those_of_the_hidden_states_in_every_layout(policy: nn.Module) -> None:
    critic = ActorCritic(policy, None)
    nn.init.normal_(critic.head.linear.weight)  # type: ignore[union-attr]
    tree, padded = (flatten(SEQUENCES, {}, image_token_id=4, layout=layout) for layout in ("tree", "padded"))  # type: ignore
    with torch.no_grad():
        shared = critic.values(**tree.model_inputs())[0][tree.edge_target]
        alone = critic.values(**padded.model_inputs()).flatten()[padded.predictor][padded.edge_target]
    torch.testing.assert_close(shared, alone)
    assert shared.std() > 0


def test_a_value_model_learns_without_the_policy(policy: nn.Module) -> None:
    critic = ActorCritic(policy, ValueModel(shared_copy(policy)))
    nn.init.normal_(critic.value.head.linear.weight)  # type: ignore[union-attr]
    critic(**inputs()).values.sum().backward()
    assert all(weight.grad is None for weight in policy.parameters())
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in critic.value_state().values())


@pytest.mark.parametrize("kind", ["adapter", "head"])
def test_saved_values_are_restored(policy: nn.Module, tmp_path: Path, kind: str) -> None:
    critic = ActorCritic(policy, ValueModel(shared_copy(policy)) if kind == "adapter" else None)
    for weight in critic.value_state().values():
        nn.init.normal_(weight)
    save_value(critic.value_state(), tmp_path)
    other = ActorCritic(policy, ValueModel(shared_copy(policy)) if kind == "adapter" else None)
    restore_value(other.value_state(), tmp_path)
    for name, weight in critic.value_state().items():
        assert torch.equal(other.value_state()[name], weight)


def test_a_missing_or_another_value_model_is_refused(policy: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{VALUE_FILE} is missing"):
        restore_value(ActorCritic(policy, None).value_state(), tmp_path)
    save_value(ActorCritic(policy, ValueModel(shared_copy(policy))).value_state(), tmp_path)
    with pytest.raises(CheckpointError, match="holds another value model"):
        restore_value(ActorCritic(policy, None).value_state(), tmp_path)
