"""A tower's pass in steps equals the whole pass, for every kind of tower."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava.model.tower_steps import states_in_steps
from tests.support.model_tools import drained
from tests.support.tiny import TOWERS, tiny_llava

NUM_LAYERS = 3


def pixels(size: int, num: int = 2) -> Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [28, 42])
@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_features_are_equal_bit_for_bit(tower: str, size: int) -> None:
    model = tiny_llava(tower=tower).model
    num_pauses, features = drained(model.tower_features_in_steps(pixels(size)))
    assert num_pauses == NUM_LAYERS
    assert torch.equal(features, model.tower_features(pixels(size)))


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_all_hidden_states_are_equal(tower: str) -> None:
    module = tiny_llava(tower=tower).model.model.vision_tower
    whole = module(pixels(28), output_hidden_states=True, return_dict=True).hidden_states
    _, states = drained(states_in_steps(module, pixels(28)))
    assert len(states) == len(whole) == NUM_LAYERS + 1
    assert all(torch.equal(one, other) for one, other in zip(states, whole, strict=True))


@torch.no_grad()
def test_an_unknown_tower_passes_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.model.tower_steps._KNOWN_TOWERS", {})
    model = tiny_llava().model
    num_pauses, features = drained(model.tower_features_in_steps(pixels(28)))
    assert num_pauses == 0 and torch.equal(features, model.tower_features(pixels(28)))
