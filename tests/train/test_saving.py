"""Restoring an adapter in a run: exactly its weights, or a one-line error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import CheckpointError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.formats import ADAPTER_FILE
from llava.model.lora import add_lora, freeze_for
from llava.train import checkpointing
from tests.support.model_tools import shake, trained

State = dict[str, torch.Tensor]


@pytest.fixture
def network(tiny: LoadedModel) -> Any:
    network = add_lora(tiny, r=4, alpha=8)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    return network


def values(network: Any) -> State:
    return {name: weight.detach().clone() for name, weight in trained(network).items()}


def test_an_adapter_comes_back(tmp_path: Path, tiny: LoadedModel, network: Any) -> None:
    hooks = checkpointing.hooks_for("adapter", network, tiny)
    hooks.save(str(tmp_path), None)
    saved = values(network)
    shake(trained(network))
    assert any(not torch.equal(weight, saved[name]) for name, weight in values(network).items())
    hooks.restore(str(tmp_path))
    assert all(torch.equal(weight, saved[name]) for name, weight in values(network).items())


def lose(state: State) -> State:
    return dict(list(state.items())[1:])


def add(state: State) -> State:
    return {**state, "base_model.model.model.language_model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 8)}


def cut(state: State) -> State:
    name = next(name for name in state if "lora_A" in name)
    return {**state, name: state[name][:2].clone()}


@pytest.mark.parametrize(
    ("change", "message"),
    [(lose, "only in one of the two"), (add, "only in one of the two"), (cut, "does not fit the model: ")],
)
def test_another_adapter_is_refused_in_one_line(
    tmp_path: Path, tiny: LoadedModel, network: Any, change: Callable[[State], State], message: str
) -> None:
    hooks = checkpointing.hooks_for("adapter", network, tiny)
    hooks.save(str(tmp_path), None)
    save_file(change(load_file(tmp_path / ADAPTER_FILE)), tmp_path / ADAPTER_FILE)
    shake(trained(network))
    before = values(network)
    with pytest.raises(CheckpointError, match=message) as caught:
        hooks.restore(str(tmp_path))
    assert "\n" not in str(caught.value)
    if change is not cut:  # names are compared before anything is written
        assert all(torch.equal(weight, before[name]) for name, weight in values(network).items())


def test_weights_that_peft_does_not_place_are_an_error(
    tmp_path: Path, tiny: LoadedModel, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = checkpointing.hooks_for("adapter", network, tiny)
    hooks.save(str(tmp_path), None)
    result = SimpleNamespace(missing_keys=["head.weight", "q_proj.lora_A.default.weight"], unexpected_keys=[])
    monkeypatch.setattr(checkpointing, "set_peft_model_state_dict", lambda model, weights: result)
    with pytest.raises(CheckpointError, match=r"could not load 1 weights of the adapter, such as q_proj.lora_A"):
        hooks.restore(str(tmp_path))
