"""Text layers of 8 bits: both kernels, what is left as it is, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llava.errors import ConfigError
from llava.model.int8 import PACKED_ROWS, Int8Linear, expanded_dtype, precision_of, quantize_text_layers
from llava.model.lora import add_lora
from tests.support.tiny import tiny_llava


@pytest.mark.parametrize("num", [1, PACKED_ROWS, PACKED_ROWS + 1, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("speedup", [0.5, 2.0])
@pytest.mark.parametrize("block", [1 << 19, 96 * 10 + 5])
def test_products_are_those_of_the_rounded_weight(
    num: int, bias: bool, speedup: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.model.int8.half_speedup", lambda *_: speedup)
    monkeypatch.setattr("llava.model.int8.BLOCK_WEIGHTS", block)
    torch.manual_seed(0)
    linear = nn.Linear(96, 64, bias=bias)
    layer = Int8Linear(linear)
    rounded = layer.weight.float() * layer.scales.float()[:, None]
    # A weight is at most half a step from its rounded value; the step is the scale of its row.
    assert bool(((rounded - linear.weight).abs() <= 0.502 * layer.scales.float()[:, None]).all())
    states = torch.randn(2, num, 96)[:1]
    wanted = nn.functional.linear(states.bfloat16().float(), rounded, linear.bias)
    with torch.no_grad():
        found = layer(states)
    assert found.shape == (1, num, 64) and found.dtype == states.dtype
    # Products are rounded to bfloat16; before they are scaled too, if they are computed in it.
    assert float((found - wanted).abs().max()) < 2**-7 * float(wanted.abs().max())


@pytest.mark.parametrize(("speedup", "dtype"), [(0.03, torch.float32), (2.0, torch.bfloat16)])
def test_many_rows_are_computed_in_what_the_processor_is_fast_in(
    speedup: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.model.int8.half_speedup", lambda *_: speedup)
    assert expanded_dtype() == dtype


def test_only_text_layers_and_head_are_quantized() -> None:
    model = tiny_llava().model
    assert precision_of(model) == "float32"
    assert quantize_text_layers(model) == 7 * 2 + 1
    assert precision_of(model) == "int8"
    kinds = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert all((".layers." in name and "language_model" in name) or name == "lm_head" for name in kinds)


def test_a_row_of_zeros_stays_zero() -> None:
    linear = nn.Linear(32, 2, bias=False)
    nn.init.zeros_(linear.weight)
    assert float(Int8Linear(linear)(torch.ones(1, 32)).abs().max()) == 0.0


def on_a_gpu() -> Any:
    return SimpleNamespace(device=torch.device("cuda:0"))


def with_adapter() -> Any:
    return add_lora(tiny_llava(), r=2, alpha=4, dropout=0.0, bias="none")


def without_linear_layers() -> Any:
    return SimpleNamespace(device=torch.device("cpu"), get_decoder=lambda: nn.Embedding(2, 2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(on_a_gpu, "on cuda:0"), (with_adapter, "merge it"), (without_linear_layers, "Embedding has none")],
)
def test_what_cannot_be_quantized_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"--weights int8.*{reason}"):
        quantize_text_layers(make())
