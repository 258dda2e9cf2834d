"""`auto` precisions follow two measured times; weights are raised only where that is faster."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.model import precision
from llava.model.builder import LoadedModel
from llava.model.precision import ProductShape, half_speedup, product_shape, raise_slow_weights

FAST, SLOW = 1.0, 3.0


MEASURED = precision._measured


@pytest.fixture(autouse=True)
def measured(equal_speeds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in every test of this file."""
    monkeypatch.setattr(precision, "_measured", MEASURED)
    MEASURED.cache_clear()


def use_times(monkeypatch: pytest.MonkeyPatch, *, full: float, half: float) -> list[torch.dtype]:
    """Set the seconds of products; return the list of measured dtypes."""
    measured: list[torch.dtype] = []

    def seconds(dtype: torch.dtype, shape: ProductShape, device_type: str, *, backward: bool) -> float:
        measured.append(dtype)
        return full if dtype == torch.float32 else half

    monkeypatch.setattr(precision, "product_seconds", seconds)
    return measured


@pytest.mark.parametrize(
    ("full", "half", "expected"),
    [(SLOW, FAST, True), (FAST, SLOW, False), (1.25, 1.0, True), (1.24, 1.0, False)],
)
def test_training_in_bf16_follows_the_measured_times(
    full: float, half: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_times(monkeypatch, full=full, half=half)
    assert precision.trains_faster_in_bf16({}, "cpu") is expected


def test_a_process_measures_a_shape_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = use_times(monkeypatch, full=FAST, half=SLOW)
    assert half_speedup(torch.bfloat16, ProductShape(1, 2, 3)) == half_speedup(torch.bfloat16, ProductShape(1, 2, 3))
    assert measured == [torch.float32, torch.bfloat16]
    half_speedup(torch.bfloat16, ProductShape(4, 5, 6))
    assert len(measured) == 4


@pytest.mark.parametrize(
    ("seconds", "expected"), [([9, 5, 3, 4], 3), ([1, 5, 3, 4], 3), ([1, 2, 8, 9], 2), ([9, 8, 7, 6], 6)]
)
def test_the_fastest_run_counts_but_the_first(
    seconds: list[float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([tick for number, taken in enumerate(seconds) for tick in (100.0 * number, 100.0 * number + taken)])
    monkeypatch.setattr(precision, "MIN_REPEATS", len(seconds))
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert precision.product_seconds(torch.float32, ProductShape(1, 1, 1), "cpu") == expected


def test_measuring_keeps_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    assert half_speedup(torch.bfloat16, ProductShape(2, 16, 16)) > 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 300, "intermediate_size": 600}, (128, 300, 600)),
        ({"text_config": {"hidden_size": 400, "intermediate_size": 900}}, (128, 400, 900)),
        ({"hidden_size": 4096, "intermediate_size": 11008}, (128, 576, 1536)),
        ({"hidden_size": 32, "intermediate_size": 64}, (128, 256, 512)),
        ({}, (128, 576, 1536)),
    ],
)
def test_training_is_decided_by_forward_and_backward_of_many_rows(
    config: dict[str, Any], expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[ProductShape, bool]] = []

    def seconds(dtype: torch.dtype, shape: ProductShape, device_type: str, *, backward: bool) -> float:
        asked.append((shape, backward))
        return SLOW if backward == (dtype == torch.float32) else FAST

    monkeypatch.setattr(precision, "product_seconds", seconds)
    assert precision.trains_faster_in_bf16(config, "cpu")
    assert asked == [(ProductShape(*expected), True)] * 2
    assert half_speedup(torch.bfloat16, product_shape(config)) < 1.0, "decoding is decided by a few rows forward"
    assert asked[2:] == [(ProductShape(16, *expected[1:]), False)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_products_of_training_are_three_and_of_decoding_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "MAX_REPEATS", precision.MIN_REPEATS)
    product = 2 * 128 * 256 * 512
    for backward, num_products in ((False, 1), (True, 3)):
        with FlopCounterMode(display=False) as counter:
            assert precision.product_seconds(dtype, ProductShape(128, 256, 512), "cpu", backward=backward) > 0.0
        assert counter.get_total_flops() == precision.MIN_REPEATS * num_products * product


@pytest.mark.parametrize(
    ("config", "device_type", "expected"),
    [
        ({"hidden_size": 300, "intermediate_size": 600}, "cpu", (16, 300, 600)),
        ({"text_config": {"hidden_size": 300, "intermediate_size": 600}, "hidden_size": 1}, "cpu", (16, 300, 600)),
        ({"hidden_size": 4096, "intermediate_size": 11008}, "cpu", (16, 576, 1536)),
        ({"hidden_size": 4096, "intermediate_size": 11008}, "cuda", (4096, 4096, 11008)),
        ({"hidden_size": 32, "intermediate_size": 64}, "cpu", (16, 256, 512)),
        ({}, "cuda", (4096, 1024, 2816)),
        ({"hidden_size": "wide", "intermediate_size": None}, "cuda", (4096, 1024, 2816)),
    ],
)
def test_shapes_are_those_of_the_model(config: dict[str, Any], device_type: str, expected: tuple[int, ...]) -> None:
    assert product_shape(config, device_type) == ProductShape(*expected)


def test_an_unknown_device_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = use_times(monkeypatch, full=SLOW, half=FAST)
    assert half_speedup(torch.bfloat16, ProductShape(1, 1, 1), "mps") == 0.0
    assert measured == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slow_half_precision_weights_are_raised(
    tiny: LoadedModel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_times(monkeypatch, full=FAST, half=SLOW)
    torch.nn.Module.to(tiny.model, dtype)
    expected = {name: weight.detach().float() for name, weight in tiny.model.named_parameters()}
    raise_slow_weights(tiny.model)
    assert precision.weights_precision(tiny.model) == "float32"
    assert all(torch.equal(weight, expected[name]) for name, weight in tiny.model.named_parameters())


def test_fast_half_precision_weights_stay(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    use_times(monkeypatch, full=SLOW, half=FAST)
    torch.nn.Module.to(tiny.model, torch.bfloat16)
    raise_slow_weights(tiny.model)
    assert precision.weights_precision(tiny.model) == "bfloat16"


def test_float32_weights_are_never_lowered(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = use_times(monkeypatch, full=SLOW, half=FAST)
    raise_slow_weights(tiny.model)
    assert precision.weights_precision(tiny.model) == "float32" and measured == []


def test_weights_that_would_not_fit_stay(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_times(monkeypatch, full=FAST, half=SLOW)
    torch.nn.Module.to(tiny.model, torch.bfloat16)
    monkeypatch.setattr(precision, "available_memory", lambda: 1000)
    with caplog.at_level(logging.WARNING):
        raise_slow_weights(tiny.model)
    assert precision.weights_precision(tiny.model) == "bfloat16"
    assert "3.0 times as long" in caplog.text and "not available" in caplog.text
