"""Attach adapters of transformers' Llava to our model, and merge them.

our model of the base --replaced weights--> --peft's layers under our names, with the file's matrices--> adapted
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.model.checkpoint.files.shards import TensorReader
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load_parts import check_adapter_names
from llava.model.checkpoint.peft_files import (
    AdaptedLayer,
    HfAdapterFile,
    hf_adapter_refusals,
    read_hf_adapter,
    setting_of,
)
from llava.model.checkpoint.weight_names import EMBEDDINGS, HEAD, PEFT_PREFIX, TOWER
from llava.model.multimodal_encoder.towers import first_line

TABLES = (EMBEDDINGS, HEAD + "weight")


def check_hf_adapter(checkpoint: Checkpoint) -> None:
    """Check that an adapter of transformers' Llava can be used, see `hf_adapter_refusals`.

    Raises:
        CheckpointError: it cannot; the message has the first reason.
    """
    for reason in hf_adapter_refusals(checkpoint):
        raise CheckpointError(f"{checkpoint.path}: {reason}")


def attach_hf_adapter(model: Any, checkpoint: Checkpoint) -> PeftModel:
    """Put an adapter of transformers' Llava on our model of its base.

    Args:
        model: the base; weights that the adapter replaces are changed in place, and marked as trained, so that
            `save_adapter` writes them.
        checkpoint: the adapter, which `check_hf_adapter` accepts.

    Raises:
        CheckpointError: it does not fit the model.
    """
    content, reader = read_hf_adapter(checkpoint), TensorReader(checkpoint.tensors)
    replaced = _replace_weights(model, content, reader, checkpoint)
    layers = {_own_name(model, name, checkpoint): layer for name, layer in content.layers.items()}
    config = _peft_config(layers, checkpoint)
    state = {
        f"{PEFT_PREFIX}{name}.{_key(part)}": reader.read(file_name)
        for name, layer in layers.items()
        for part, file_name in layer.parts.items()
    }
    try:
        with torch.random.fork_rng(devices=[]):  # new matrices are random before they are replaced
            adapted = cast(PeftModel, get_peft_model(model, config))
        check_adapter_names(adapted, state, next(iter(checkpoint.tensors.values())).file)
        set_peft_model_state_dict(adapted, state)
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.path}: the adapter does not fit: {first_line(error)}") from error
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    for parameter in replaced:
        parameter.requires_grad_(True)
    nn.Module.train(adapted, False)
    return adapted


def merge_hf_adapter(adapted: PeftModel, checkpoint: Checkpoint) -> Any:
    """Return the model with an attached adapter added to its weights.

    Raises:
        CheckpointError: it cannot be added, also where one table serves as embeddings and head.
    """
    config = cast(Any, adapted).config
    adapted_tables = [name for name in TABLES if name.removesuffix(".weight") in read_hf_adapter(checkpoint).layers]
    if config.tie_word_embeddings and adapted_tables:
        raise CheckpointError(
            f"{checkpoint.path}: it adapts {adapted_tables[0]}, but its base has one table for embeddings and head, "
            "which cannot hold both; merge it with peft into untied weights, and pass the whole model"
        )
    try:
        merged = cast(Any, adapted).merge_and_unload()
    except (ValueError, RuntimeError) as error:  # such as a bias for a layer that has none
        raise CheckpointError(
            f"{checkpoint.path}: peft cannot add this adapter to the weights: {first_line(error)}"
        ) from error
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return merged


def _peft_config(layers: dict[str, AdaptedLayer], checkpoint: Checkpoint) -> LoraConfig:
    """Return peft's configuration for layers by our names.

    Names in the file are those of modules of the base's class.
    """
    given = checkpoint.adapter
    ranks = {name: setting_of(given, "r", "rank_pattern", layer.base_name) for name, layer in layers.items()}
    alphas = {name: setting_of(given, "lora_alpha", "alpha_pattern", layer.base_name) for name, layer in layers.items()}
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=float(given.get("lora_dropout") or 0.0),
        use_rslora=bool(given.get("use_rslora")),
        use_dora=bool(given.get("use_dora")),
        lora_bias=any("B.bias" in layer.parts for layer in layers.values()),
        target_modules=list(layers),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        task_type="CAUSAL_LM",
    )


def _key(part: str) -> str:
    """Return peft's name of a part of a layer's adapter, as its files have it."""
    if part in ("A", "B"):
        return f"lora_{part}.weight"
    return f"lora_{part}"


def _own_name(model: nn.Module, name: str, checkpoint: Checkpoint) -> str:
    """Return the module's name in the model: some towers have one more part, `vision_model.`.

    Raises:
        CheckpointError: the layer is missing or has another size.
    """
    nested = name.replace(TOWER, f"{TOWER}vision_model.", 1)
    modules = dict(model.named_modules())
    found = next((place for place in (name, nested) if place in modules), None)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.path}: the adapter does not fit: the model has no layer {name}; pass the base it was trained "
            "on with --model-base"
        )
    return found


def _replace_weights(
    model: nn.Module, content: HfAdapterFile, reader: TensorReader, checkpoint: Checkpoint
) -> list[nn.Parameter]:
    """Copy weights that were trained whole into the model and return them.

    Raises:
        CheckpointError: the model lacks a weight, or has it in another size or in quantized form.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    for name, file_name in content.replaced.items():
        tensor = reader.read(file_name)
        parameter = parameters.get(name, parameters.get(name.replace(TOWER, f"{TOWER}vision_model.", 1)))
        if parameter is None or not _fits(name, parameter, tensor):
            shape = "no such weight" if parameter is None else f"{tuple(parameter.shape)} {parameter.dtype}"
            raise CheckpointError(
                f"{checkpoint.path}: the adapter does not fit: {file_name} is {tuple(tensor.shape)}, in the model "
                f"{shape}; pass the base it was trained on with --model-base, unquantized"
            )
        with torch.no_grad():
            parameter[: len(tensor)].copy_(tensor) if tensor.dim() else parameter.copy_(tensor)
        found[name] = parameter
    for name, parameter in found.items():
        # One table may serve as embeddings and head: then what was copied last holds for both.
        rows = reader.read(content.replaced[name]).to(parameter.device, parameter.dtype)
        is_table, other = name in TABLES, {*TABLES} - {name}
        is_shared = is_table and any(parameters.get(table) is parameter for table in other)
        if is_shared and (not other <= found.keys() or not torch.equal(parameter[: len(rows)], rows)):
            raise CheckpointError(
                f"{checkpoint.path}: it replaces {name} alone, but its base has one table for embeddings and head; "
                "pass a whole model with untied weights"
            )
    return list(found.values())


def _fits(name: str, parameter: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor can replace a weight; embeddings may have grown since by rows of new tokens."""
    if not parameter.is_floating_point():
        return False
    if name in TABLES:
        return tensor.dim() == 2 and tensor.shape[1] == parameter.shape[1] and len(tensor) <= len(parameter)
    return tensor.shape == parameter.shape
