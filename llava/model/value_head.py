"""Value model: a number for the hidden state at each position, from a head that starts at zero.

hidden states at `logits_to_keep` --ValueHead--> values      (adapter: a second LoRA on the same frozen weights)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.model.checkpoint.load_parts import read_tensors

VALUE_FILE = "value_model.safetensors"
"""File in a checkpoint with the trained weights of the value model."""

M = TypeVar("M", bound=nn.Module)


class ValueHead(nn.Module):
    """Linear map of hidden states [..., D] to values [...], in float32; zero at the start."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the values."""
        values: Tensor = self.linear(hidden.float())[..., 0]
        return values


def shared_copy(network: M) -> M:
    """Return a copy with trained weights of its own; frozen weights are the same tensors."""
    frozen = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, cast(dict[int, Any], frozen))


def hidden_size(network: nn.Module) -> int:
    """Return the width of the hidden states of a model, or of a peft model around it."""
    return int(cast(Any, network).config.get_text_config().hidden_size)


def hidden_states(network: nn.Module, **inputs: Any) -> Tensor:
    """Return the last hidden states [B, T, D], those of `logits_to_keep` [1, M, D] where it is given."""
    kept = inputs.pop("logits_to_keep", None)
    whole = cast(Any, network).get_base_model() if hasattr(network, "get_base_model") else network
    states: Tensor = cast(Any, whole).model(**inputs).last_hidden_state
    return states if kept is None else states[:, kept]


class ValueModel(nn.Module):
    """Value model with weights of its own.

    Args:
        network: a model, or a peft model around it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.head = ValueHead(hidden_size(network))
        self.config = network.config

    def forward(self, **inputs: Any) -> Tensor:
        """Return the value at each kept position."""
        values: Tensor = self.head(hidden_states(self.network, **inputs))
        return values

    def gradient_checkpointing_enable(self, **keywords: Any) -> None:
        """Compute activations again in the backward pass."""
        cast(Any, self.network).gradient_checkpointing_enable(**keywords)

    def head_state(self) -> dict[str, Tensor]:
        """Return the weights of the head by name."""
        return {f"head.{name}": weight for name, weight in self.head.named_parameters()}


class ActorCritic(nn.Module):
    """Policy with a value model; the output has `logits` and `values`.

    Args:
        policy: the policy.
        value: the value model; None adds a head to the hidden states of the policy.
    """

    def __init__(self, policy: nn.Module, value: ValueModel | None) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.head = ValueHead(hidden_size(policy)) if value is None else None
        self.config = policy.config

    def forward(self, **inputs: Any) -> Any:
        """Return logits and values at the kept positions."""
        if self.value is not None:
            return SimpleNamespace(logits=self.policy(**inputs).logits, values=self.value(**inputs))
        assert self.head is not None
        hidden = hidden_states(self.policy, **inputs)
        return SimpleNamespace(logits=cast(Any, self.policy).get_output_embeddings()(hidden), values=self.head(hidden))

    def values(self, **inputs: Any) -> Tensor:
        """Return the values only."""
        if self.value is not None:
            return cast(Tensor, self.value(**inputs))
        assert self.head is not None
        return cast(Tensor, self.head(hidden_states(self.policy, **inputs)))

    def gradient_checkpointing_enable(self, **keywords: Any) -> None:
        """Compute activations again in the backward pass, in policy and value model."""
        for network in (self.policy, *([self.value.network] if self.value is not None else [])):
            cast(Any, network).gradient_checkpointing_enable(**keywords)

    def value_state(self) -> dict[str, Tensor]:
        """Return the trained weights of the value model by name."""
        part = self.head if self.value is None else self.value
        assert part is not None
        return {name: weight for name, weight in part.named_parameters() if weight.requires_grad}


def save_value(weights: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write the trained weights of a value model into a checkpoint."""
    copies = {name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}
    save_file(copies, Path(folder) / VALUE_FILE)


def restore_value(weights: Mapping[str, Tensor], folder: str | Path) -> None:
    """Load what `save_value` wrote into the weights of these names.

    Raises:
        CheckpointError: the file is missing or broken, or holds other weights.
    """
    path = Path(folder) / VALUE_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint has no value model to continue")
    load_into(weights, read_tensors(path), path)


def load_into(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    """Copy saved weights into those of the same names.

    Raises:
        CheckpointError: names or shapes differ.
    """
    wrong = [name for name in own if name not in saved or saved[name].shape != own[name].shape]
    if wrong or len(saved) != len(own):
        raise CheckpointError(f"{path}: holds another value model; {len(wrong) or len(saved)} weights do not fit")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(saved[name])
