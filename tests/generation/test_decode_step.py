"""The decoding step in few operator calls equals the model's own forward, and is used only where it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from llava.data.encode import Encoded
from llava.generation.decode_step import can_decode
from llava.generation.extension import PartsExtension
from llava.generation.products import Product
from llava.generation.runners import SlotRunner
from llava.model.int8 import quantize_text_layers
from llava.model.lora import add_lora
from tests.support.model_tools import drained
from tests.support.tiny import tiny_llava

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 2}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 6, "num_key_value_heads": 1}),
    ("qwen2", {"num_key_value_heads": 2}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
]


def sequences(num: int) -> list[Encoded]:
    """Return prompts of different lengths that begin alike."""
    ids = [(1, *range(10, 20), *range(30, 33 + 2 * number)) for number in range(num)]
    return [Encoded(one, (-100,) * len(one), (0,) * len(one), (), ()) for one in ids]


def logits_of(model: Any, num: int, *, is_fast: bool) -> torch.Tensor:
    """Return the logits of three steps [3, B, V], of the step or the model's own forward; one sequence ends between."""
    runner = SlotRunner(model, image_token_id=model.config.image_token_id, max_slots=8, max_length=200)
    with torch.no_grad():
        row = runner.prefill(sequences(num), {})
        runner.join(row, range(num))
        assert runner.step is not None
        if not is_fast:
            runner.step = None
        return torch.stack([runner.decode([7 + number] * num) for number in range(3)]).clone()


@pytest.mark.parametrize("num", [1, 4])
@pytest.mark.parametrize(("lm", "sizes"), MODELS)
def test_the_step_equals_the_models_forward(lm: str, sizes: dict[str, Any], num: int) -> None:
    model = tiny_llava(lm=lm, lm_sizes=sizes).model.eval()
    found, wanted = (logits_of(model, num, is_fast=is_fast) for is_fast in (True, False))
    # Rounding of float32 sums of some hundred terms, on logits of the size of `wanted`.
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def read_in_pieces(model: Any, *, is_fast: bool) -> torch.Tensor:
    """Return the logits [2, V] after two prompts that are read in two passes; the first is longer by a piece."""
    runner = SlotRunner(model, image_token_id=model.config.image_token_id, max_slots=8, max_length=200)
    long, short = sequences(2)[1], sequences(1)[0]
    with torch.no_grad():
        embeds = [drained(runner.embed(one, 0, [], {}))[1] for one in (long, short)]
        assert runner.step is not None
        if not is_fast:
            runner.step = None
        first = PartsExtension([], 0, 6)
        assert len(runner.read([first], [embeds[0][:, :6]], [])) == 0
        second = [
            PartsExtension([first.states()], 6, len(long.input_ids) - 6),
            PartsExtension([], 0, len(short.input_ids)),
        ]
        return runner.read(second, [embeds[0][:, 6:], embeds[1]])


@pytest.mark.parametrize(("lm", "sizes"), MODELS)
def test_prompts_that_are_read_equal_the_models_forward(lm: str, sizes: dict[str, Any]) -> None:
    model = tiny_llava(lm=lm, lm_sizes=sizes).model.eval()
    found, wanted = (read_in_pieces(model, is_fast=is_fast) for is_fast in (True, False))
    # As above.
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("rows", [0, 1, 2, 4, 8, 9])
@pytest.mark.parametrize(("num_outputs", "has_bias"), [(1 << 14, True), (1 << 11, False)])
def test_products_of_few_rows(rows: int, num_outputs: int, has_bias: bool) -> None:
    layer = nn.Linear(256, num_outputs, bias=has_bias).requires_grad_(False)
    states = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    # Sums of 256 terms of at most 1/16 each in another order.
    assert torch.allclose(Product(layer).of(states), layer(states), atol=1e-5)


def test_the_step_in_bfloat16() -> None:
    model = tiny_llava(lm_sizes={"num_key_value_heads": 2}).model.eval().to(torch.bfloat16)
    found, wanted = (logits_of(model, 3, is_fast=is_fast).float() for is_fast in (True, False))
    # Both round to 8 bits after every operation, in another order: some units of the last place.
    assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_a_layer_is_few_operator_calls() -> None:
    calls = []
    for num_layers in (2, 4):
        model = tiny_llava(lm_sizes={"num_hidden_layers": num_layers}).model.eval()
        runner = SlotRunner(model, image_token_id=model.config.image_token_id, max_slots=8, max_length=200)
        with torch.no_grad():
            runner.join(runner.prefill(sequences(4), {}), range(4))
            runner.decode([7] * 4)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                runner.decode([7] * 4)
        calls.append(sum(event.count for event in profiled.key_averages()))
    assert (calls[1] - calls[0]) / 2 <= 150


def hooked(model: Any) -> None:
    model.get_decoder().layers[1].mlp.register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    mlp = model.get_decoder().layers[0].mlp
    mlp.up_proj = nn.Sequential(mlp.up_proj)


def mixed(model: Any) -> None:
    model.get_decoder().norm.double()


@pytest.mark.parametrize("change", [hooked, replaced, mixed])
def test_a_changed_model_uses_its_own_forward(change: Callable[[Any], None]) -> None:
    model = tiny_llava().model.eval()
    assert can_decode(model)
    change(model)
    assert not can_decode(model)


def test_adapters_and_other_models_use_their_own_forward() -> None:
    assert not can_decode(add_lora(tiny_llava(), r=2, alpha=4, dropout=0.0, bias="none"))
    assert not can_decode(nn.Linear(2, 2))


def test_eight_bits_are_decoded_by_the_step() -> None:
    model = tiny_llava(lm_sizes={"num_key_value_heads": 2}).model.eval()
    quantize_text_layers(model)
    found, wanted = (logits_of(model, 3, is_fast=is_fast) for is_fast in (True, False))
    # Rows are rounded to bfloat16 before every product; a rounding that falls the other way is 2^-9 of a value.
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
