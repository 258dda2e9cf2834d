"""Read LoRA adapters of the legacy formats, and merge them or convert them to a peft adapter.

W <- W + (alpha / r) * B @ A        in float32, then the weight's own dtype
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.checkpoint.files.shards import TensorReader
from llava.model.checkpoint.formats import ADAPTER_CONFIG_FILE, Checkpoint
from llava.model.checkpoint.peft_files import strange_settings
from llava.model.checkpoint.weight_names import (
    LEGACY_PREFIXES,
    PEFT_PREFIX,
    TOWER,
    TOWER_ROOT,
    renamed_prefix,
    without_peft,
)

PARTS = (".lora_A.", ".lora_B.")

UNSUPPORTED = (
    *("use_dora", "use_qalora", "fan_in_fan_out", "lora_bias", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layers_pattern", "trainable_token_indices", "target_parameters"),
)
"""Settings of adapter_config.json under which W + (alpha / r) * B @ A is not all that was trained."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """Names in the file of one adapted layer's A [r, in] and B [out, r]."""

    down: str
    up: str


@dataclass(frozen=True, slots=True)
class LegacyLora:
    """Adapter of a legacy format.

    Attributes:
        folder: folder of the adapter.
        config: adapter_config.json.
        pairs: matrices by our name of the adapted layer.
        dropped: copies of a tower's adapter, which its own folder holds (STLLaVA-Med).
        reader: its tensors.
    """

    folder: Path
    config: dict[str, Any]
    pairs: dict[str, LoraPair]
    dropped: list[str]
    reader: TensorReader

    @property
    def scale(self) -> float:
        """Factor of B @ A."""
        r = int(self.config["r"])
        alpha = float(self.config["lora_alpha"])
        return float(alpha / r**0.5) if self.config.get("use_rslora") else alpha / r

    def update(self, layer: str) -> Tensor:
        """Return what this adapter adds to a layer's weight, [out, in] float32."""
        pair = self.pairs[layer]
        return self.scale * (self.reader.read(pair.up).float() @ self.reader.read(pair.down).float())


def read_lora(checkpoint: Checkpoint, *, tower: bool = False) -> LegacyLora:
    """Return the adapter in an opened folder.

    Args:
        checkpoint: folder with adapter_config.json and the weights.
        tower: it is a vision tower's own adapter.

    Raises:
        CheckpointError: it is of a type that the legacy trainers never wrote.
    """
    folder, config, reader = checkpoint.folder, checkpoint.adapter, TensorReader(checkpoint.tensors)
    file = next((entry.file for entry in checkpoint.tensors.values()), folder)
    _check_settings(config, folder / ADAPTER_CONFIG_FILE)
    pairs: dict[str, dict[str, str]] = {}
    dropped: list[str] = []
    for name in reader.names:
        layer = _layer(name, tower=tower)
        if layer is None:
            raise CheckpointError(f"{file}: tensor {name} is not part of a LoRA adapter in the legacy format")
        if layer.startswith(TOWER) and not tower:
            dropped.append(name)
        else:
            pairs.setdefault(layer, {})[next(part for part in PARTS if part in name)] = name
    if incomplete := [layer for layer, pair in pairs.items() if set(pair) != set(PARTS)]:
        raise CheckpointError(f"{file}: {incomplete[0]} has only one of LoRA's two matrices")
    complete = {layer: LoraPair(pair[PARTS[0]], pair[PARTS[1]]) for layer, pair in pairs.items()}
    _check_ranks(folder, config, complete, reader)
    return LegacyLora(folder, config, complete, dropped, reader)


def _check_settings(config: Mapping[str, Any], file: Path) -> None:
    """Check that an adapter is a plain LoRA adapter.

    Raises:
        CheckpointError: it is not; names the setting.
    """
    if strange := strange_settings(config, UNSUPPORTED):
        raise CheckpointError(
            f"{file}: {', '.join(strange)}; expected a plain LoRA adapter, W + (alpha / r) * B @ A. Merge it with "
            "peft's merge_and_unload, and pass the whole model"
        )


def _check_ranks(folder: Path, config: Mapping[str, Any], pairs: Mapping[str, LoraPair], reader: TensorReader) -> None:
    """Check that the settings fit the matrices; their scale, alpha / r, cannot be checked otherwise.

    Raises:
        CheckpointError: they are not numbers, or of another rank.
    """
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"{folder}/{ADAPTER_CONFIG_FILE}: r is {r!r}, lora_alpha {alpha!r}; expected numbers as in training"
        )
    for layer, pair in pairs.items():
        down, up = reader.entries[pair.down].shape, reader.entries[pair.up].shape
        if len(down) != 2 or len(up) != 2 or (down[0], up[1]) != (r, r):
            raise CheckpointError(
                f"{folder}: {layer} has matrices {down} and {up}, {ADAPTER_CONFIG_FILE} says r = {r}; expected "
                "[r, in] and [out, r] of one training run"
            )


def check_copies(adapter: LegacyLora) -> None:
    """Check that no tower adapter is lost whose copies are here and whose own folder is not.

    Copies that change nothing (B all zero, as the published trainer left them) may be dropped; others need the settings
    that only their folder holds.

    Raises:
        CheckpointError: a copy changes the tower.
    """
    for name in adapter.dropped:
        if PARTS[1] in name and bool(adapter.reader.read(name).any()):
            raise CheckpointError(
                f"{adapter.folder}: {name} belongs to an adapter of the tower, whose own folder (Vit-lora) is missing; "
                "pass it with --lora-pretrain"
            )


def _layer(name: str, *, tower: bool) -> str | None:
    """Return our name of the layer that a tensor of an adapter file belongs to."""
    part = next((part for part in PARTS if part in name), None)
    if part is None:
        return None
    layer = name.split(part, maxsplit=1)[0]
    if tower and layer.startswith(TOWER_ROOT):
        return TOWER + layer.removeprefix(TOWER_ROOT)
    return renamed_prefix(without_peft(layer), LEGACY_PREFIXES)


def merged_weights(state: Mapping[str, Tensor], adapters: list[LegacyLora]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of `state` that adapters change, with the change.

    Raises:
        CheckpointError: an adapter is for layers that the model does not have, or of another size.
    """
    for adapter in adapters:
        for layer in adapter.pairs:
            yield f"{layer}.weight", with_update(adapter, layer, state.get(f"{layer}.weight"))


def with_update(adapter: LegacyLora, layer: str, weight: Tensor | None) -> Tensor:
    """Return one weight with what an adapter adds to it.

    Raises:
        CheckpointError: the model lacks the layer, or has it in another size.
    """
    update = adapter.update(layer)
    if weight is None or weight.shape != update.shape:
        got = "no such layer" if weight is None else f"{tuple(weight.shape)}"
        raise CheckpointError(
            f"{adapter.folder}: the adapter does not fit: {layer} is {tuple(update.shape)} there, in the model "
            f"{got}; pass the base it was trained on with --model-base"
        )
    return (weight.float() + update).to(weight.dtype)


def peft_parts(adapters: list[LegacyLora]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return legacy adapters as one of peft: its configuration, and its weights under peft's names."""
    main = adapters[0]
    layers = [layer for adapter in adapters for layer in adapter.pairs]
    others = [(adapter, layer) for adapter in adapters[1:] for layer in adapter.pairs]
    config = LoraConfig(
        r=int(main.config["r"]),
        lora_alpha=int(main.config["lora_alpha"]),
        lora_dropout=float(main.config.get("lora_dropout") or 0.0),
        use_rslora=bool(main.config.get("use_rslora")),
        target_modules=layers,
        rank_pattern={layer: int(adapter.config["r"]) for adapter, layer in others},
        alpha_pattern={layer: int(adapter.config["lora_alpha"]) for adapter, layer in others},
        task_type="CAUSAL_LM",
    )
    state = {}
    for adapter in adapters:
        for layer, pair in adapter.pairs.items():
            state[f"{PEFT_PREFIX}{layer}.lora_A.weight"] = adapter.reader.read(pair.down)
            state[f"{PEFT_PREFIX}{layer}.lora_B.weight"] = adapter.reader.read(pair.up)
    return config, state


def attach_adapters(model: Any, adapters: list[LegacyLora]) -> PeftModel:
    """Add legacy adapters to a model as one peft adapter, unmerged.

    Raises:
        CheckpointError: they do not fit the model.
    """
    config, state = peft_parts(adapters)
    try:
        adapted = cast(PeftModel, get_peft_model(model, config))
        result: Any = set_peft_model_state_dict(adapted, state)
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{adapters[0].folder}: the adapter does not fit: {str(error).splitlines()[0]}"
        ) from error
    if result.unexpected_keys:
        raise CheckpointError(f"{adapters[0].folder}: the adapter does not fit: {result.unexpected_keys[0]}")
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    torch.nn.Module.train(adapted, False)
    return adapted
