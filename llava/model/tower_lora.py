"""LoRA in the vision tower: adapted layers, their rank and dropout, and initial weights.

hidden states 0 .. n of n blocks, the selected one is the projector's input --> blocks below it have a gradient
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from llava.errors import CheckpointError, ConfigError
from llava.model.builder import gathered_weight
from llava.model.checkpoint.formats import KINDS, Checkpoint
from llava.model.checkpoint.legacy.export_parts import TOWER_ADAPTER_FOLDER
from llava.model.checkpoint.legacy.lora_files import LegacyLora, read_lora
from llava.model.checkpoint.weight_names import PEFT_PREFIX, TOWER

MODULE = TOWER.removesuffix(".")
"""Name of the tower in the model."""


@dataclass(frozen=True, slots=True)
class TowerLora:
    """Settings of the tower's adapter.

    Attributes:
        r: rank.
        alpha: the adapter is scaled by alpha / r.
        dropout: dropout of the adapter's input.
        frozen: adapt all blocks and train none, as the published trainer does without saying so.
        weights: adapter to start from: a file, its folder, or a folder with `Vit-lora/`; None for a new one.
    """

    r: int = 64
    alpha: int = 32
    dropout: float = 0.2
    frozen: bool = False
    weights: str | None = None


def tower_linear_layers(model: nn.Module, *, all_blocks: bool = False) -> str:
    """Return a regular expression for linear layers of the tower's blocks below the selected hidden state.

    Args:
        model: the model.
        all_blocks: also those above, which never get a gradient.

    Raises:
        ConfigError: the tower has no such layers.
    """
    config: Any = cast(Any, model).config
    count = int(config.vision_config.num_hidden_layers)
    selected = config.vision_feature_layer
    states = [layer % (count + 1) for layer in (selected if isinstance(selected, list) else [selected])]
    numbers = range(count if all_blocks else max(states))
    tower = model.get_submodule(MODULE)
    lists = ((name, part) for name, part in tower.named_modules() if isinstance(part, nn.ModuleList))
    name, blocks = next(((name, part) for name, part in lists if len(part) == count), ("", nn.ModuleList()))
    inside = [
        [f"{number}.{layer}" for layer, module in blocks[number].named_modules() if isinstance(module, nn.Linear)]
        for number in numbers
        if number < len(blocks)
    ]
    if not any(inside):
        raise ConfigError(
            f"--vit-lora-enable: the tower {type(tower).__name__} has no linear layers below hidden state {selected}"
        )
    kinds = {tuple(layer.partition(".")[2] for layer in layers) for layers in inside}
    if len(kinds) == 1:  # one short pattern for blocks that are alike
        ends = "|".join(map(re.escape, sorted(kinds.pop())))
        return rf"{re.escape(TOWER + name)}\.(?:{'|'.join(map(str, numbers))})\.(?:{ends})"
    return rf"{re.escape(TOWER + name)}\.(?:{'|'.join(re.escape(layer) for layers in inside for layer in layers)})"


def set_tower_dropout(network: nn.Module, dropout: float) -> None:
    """Set the dropout of the tower's adapter, for which peft's configuration has no pattern."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer) and TOWER in name:
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = nn.Dropout(dropout) if dropout else nn.Identity()


def start_tower_lora(network: nn.Module, settings: TowerLora) -> None:
    """Load the initial weights of a tower's adapter; those of blocks that are not adapted are ignored.

    Raises:
        CheckpointError: the path holds no adapter of a tower, or one of another rank, scale or layers.
    """
    if settings.weights is None:
        return
    adapter = _open(settings.weights)
    got = {"--lora-r-vit": int(adapter.config["r"]), "--lora-alpha-vit": int(adapter.config["lora_alpha"])}
    expected = {"--lora-r-vit": settings.r, "--lora-alpha-vit": settings.alpha}
    if got != expected:
        there = ", ".join(f"{name} {value}" for name, value in got.items())
        here = ", ".join(f"{name} {value}" for name, value in expected.items())
        raise CheckpointError(f"{settings.weights}: the adapter has {there}, this run {here}; use the same values")
    parameters = dict(network.named_parameters())
    own = {name.split(".lora_A.", 1)[0].removeprefix(PEFT_PREFIX) for name in parameters if ".lora_A." in name}
    missing = sorted(layer for layer in own if layer.startswith(TOWER) and layer not in adapter.pairs)
    if missing:
        raise CheckpointError(
            f"{settings.weights}: the adapter lacks {len(missing)} layers of this tower, such as {missing[0]}"
        )
    for layer in own & adapter.pairs.keys():
        pair = adapter.pairs[layer]
        for half, name in (("lora_A", pair.down), ("lora_B", pair.up)):
            parameter = parameters[f"{PEFT_PREFIX}{layer}.{half}.default.weight"]
            _put(parameter, adapter.reader.read(name), f"{settings.weights}: {name}")


def _put(parameter: nn.Parameter, values: torch.Tensor, name: str) -> None:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if shape != tuple(values.shape):
        raise CheckpointError(f"{name} is {tuple(values.shape)}, the model needs {shape}")
    with torch.no_grad(), gathered_weight(parameter):
        parameter.copy_(values)


def _open(path: str) -> LegacyLora:
    """Return the adapter of a tower: a file, its folder, or a folder that holds it as `Vit-lora/`."""
    given = Path(path)
    folder = given.parent if given.is_file() else given
    inner = folder / TOWER_ADAPTER_FOLDER
    if not folder.is_dir():
        raise CheckpointError(f"--pretrain-lora {path}: no such file or folder; expected an adapter of a vision tower")
    checkpoint = Checkpoint.open(inner if inner.is_dir() else folder)
    if checkpoint.kind != "tower_adapter":
        raise CheckpointError(
            f"--pretrain-lora {path}: expected {KINDS['tower_adapter']}, got {KINDS[checkpoint.kind]}"
        )
    return read_lora(checkpoint, tower=True)
