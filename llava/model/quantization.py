"""Loading a language model in 4 or 8 bits (bitsandbytes extra)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from llava.errors import ConfigError
from llava.utils.lookup import require

EXCLUDED = [".*lm_head", ".*multi_modal_projector", ".*vision_tower"]
"""Parts that stay in full precision, as in the seeds; patterns for the beginning of a layer's full name."""


def quantization_config(
    bits: int, dtype: torch.dtype, *, double_quant: bool = True, quant_type: str = "nf4"
) -> BitsAndBytesConfig | None:
    """The configuration that `from_pretrained` takes, or None for 16 (no quantization).

    Raises:
        ConfigError: `bits` is not 4, 8 or 16.
        MissingDependency: bitsandbytes is not installed.
    """
    if bits == 16:
        return None
    if bits not in (4, 8):
        raise ConfigError(f"bits is {bits}; expected 4, 8 or 16")
    require("bitsandbytes", "train")
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=EXCLUDED,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
    )


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model whose weights are 4-bit or 8-bit; found without importing bitsandbytes."""
    return [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
