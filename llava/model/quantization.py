"""Settings for loading a language model in 4 or 8 bits (bitsandbytes extra)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from llava.errors import ConfigError
from llava.utils.lookup import require

EXCLUDED = [".*lm_head", ".*multi_modal_projector", ".*vision_tower"]
"""Parts that keep full precision, as in the original trainers; patterns for the start of a layer's full name."""


QUANT_TYPES = ("nf4", "fp4")


@dataclass(frozen=True, slots=True)
class Quantization:
    """Precision of the language model's weights.

    Attributes:
        bits: 16 means no quantization.
        double_quant: with 4 bits, quantize the quantization constants too.
        quant_type: the 4-bit format, one of `QUANT_TYPES`.
    """

    bits: int = 16
    double_quant: bool = True
    quant_type: str = "nf4"

    def config(self, dtype: torch.dtype) -> BitsAndBytesConfig | None:
        """Return the configuration for `from_pretrained`, or None for 16 bits.

        Args:
            dtype: dtype that the layers compute in.

        Raises:
            ConfigError: a value is unknown.
            MissingDependency: bitsandbytes is not installed.
        """
        if self.bits == 16:
            return None
        if self.bits not in (4, 8):
            raise ConfigError(f"bits is {self.bits}; expected 4, 8 or 16")
        if self.quant_type not in QUANT_TYPES:
            raise ConfigError(f"quant_type is {self.quant_type!r}; expected {' or '.join(QUANT_TYPES)}")
        require("bitsandbytes", "train")
        return BitsAndBytesConfig(
            load_in_4bit=self.bits == 4,
            load_in_8bit=self.bits == 8,
            llm_int8_skip_modules=EXCLUDED,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_quant_type=self.quant_type,
        )


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model whose weights are 4-bit or 8-bit; bitsandbytes is not imported."""
    return [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
