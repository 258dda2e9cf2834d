"""Causal language models that a model can be built around; others are refused before assembly.

configuration --language_config--> no other modality, plain head        model --language_trunk--> the part without head
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llava.errors import CheckpointError
from llava.model.config_sizes import auto_config
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line

HEAD_EXTRAS = (
    *("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier"),
    "output_multiplier_scale",
)
"""Configuration keys of language models that change the logits after the head; ours is a plain linear layer."""

TRUNK_INPUTS = ("inputs_embeds", "attention_mask", "past_key_values")
"""What transformers' Llava passes to its language model; recurrent ones (Mamba, RWKV, xLSTM) take another state."""


def language_config(lm: str) -> Any:
    """Return the configuration of a language model that a model can be built around.

    Raises:
        CheckpointError: it cannot be read, is of a multimodal model, or its head is not a plain linear layer.
    """
    try:
        config = auto_config(lm)
    except UNREADABLE as error:
        raise CheckpointError(f"language model {lm} cannot be loaded: {first_line(error)}") from error
    if hasattr(config, "vision_config") or config.get_text_config() is not config:
        kind = "vision-language" if hasattr(config, "vision_config") else "multimodal"
        raise CheckpointError(
            f"{lm} is already a {kind} model ({config.model_type}); expected a plain causal language model"
        )
    extras = [name for name in HEAD_EXTRAS if getattr(config, name, None) not in (None, 1, 1.0)]
    if extras:
        raise CheckpointError(
            f"{lm} ({config.model_type}) changes its logits after the head ({extras[0]}), which is not supported; "
            "use a language model with a plain head (Llama, Mistral, Qwen2, Phi, GPT-2, ...)"
        )
    return config


def language_trunk(language_model: PreTrainedModel, name: str) -> nn.Module:
    """Return a causal language model without its head: the part that holds its embeddings.

    Args:
        language_model: the model.
        name: its name, for the message.

    Raises:
        CheckpointError: weights are neither in this part nor in a plain head, or the part takes other inputs.
    """
    # `base_model` is wrong for a language model that is named as the part of a larger one (Llama 4).
    table: Any = language_model.get_input_embeddings()
    head: Any = language_model.get_output_embeddings()
    holders = [child for child in language_model.children() if any(part is table for part in child.modules())]
    if head is None or len(holders) != 1 or holders[0] is table:
        raise CheckpointError(
            f"{name} ({language_model.config.model_type}) has no part of its own between embeddings and head, so it "
            "cannot be built on; use another causal language model (Llama, Mistral, Qwen2, Phi, GPT-2, ...)"
        )
    known = {id(parameter) for part in (holders[0], head) for parameter in part.parameters()}
    extra = [name for name, parameter in language_model.named_parameters() if id(parameter) not in known]
    if extra:
        raise CheckpointError(
            f"{name} ({language_model.config.model_type}) has layers between its last hidden state and its head "
            f"({extra[0]}), which is not supported; use a language model with a plain head (Llama, Mistral, Qwen2, ...)"
        )
    rows = [int(getattr(layer.weight, "ds_shape", layer.weight.shape)[0]) for layer in (table, head)]
    if rows[0] != rows[1]:
        raise CheckpointError(
            f"{name} ({language_model.config.model_type}) has {rows[0]} embeddings and a head of {rows[1]} rows; "
            "expected equal numbers, since tokens are added to both"
        )
    inputs = inspect.signature(holders[0].forward).parameters
    if absent := [word for word in TRUNK_INPUTS if word not in inputs]:
        raise CheckpointError(
            f"{name} ({language_model.config.model_type}) does not take {absent[0]}, so it cannot be built on; use a "
            "language model with attention (Llama, Mistral, Qwen2, Phi, GPT-2, ...)"
        )
    return holders[0]
