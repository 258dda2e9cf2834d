"""Speed of half precision relative to float32 on this device, measured once per process.

    configuration --product_shape--> shape --time forward and backward--> training_speedup --> `--bf16 auto`
                                           --time forward---------------> half_speedup ------> `--dtype auto`

Training multiplies many rows, forward and backward; evaluation and chat decode a few rows at a time. Some CPUs have
instructions for bfloat16 and gain up to fourfold; on others a bfloat16 product is 40 times slower.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from llava.constants import DTYPES
from llava.utils.memory import available_memory

logger = logging.getLogger(__name__)

MIN_TRAINING_SPEEDUP = 1.25
"""Smallest speedup with which `--bf16 auto` trains in bfloat16; autocast's conversions cost part of the gain."""

HALF_PRECISION = (torch.bfloat16, torch.float16)

DEFAULT_SIZES = (1024, 2816)
"""Hidden and intermediate size if the configuration is unknown, as for a hub name."""

MIN_SIZES, MAX_CPU_SIZES = (256, 512), (576, 1536)
"""Bounds of the measured sizes: smaller products measure call overhead; on a CPU, larger ones take seconds."""

CPU_ROWS, CPU_TRAINING_ROWS, GPU_ROWS = 16, 128, 4096
"""Rows of the measured product: of decoding, of training, and on a GPU, enough to outweigh the kernel launch."""

MIN_REPEATS, MAX_REPEATS, ENOUGH_SECONDS = 2, 20, 0.05
"""Smallest and largest number of repeats of a product, and the total time after which repeats stop."""


@dataclass(frozen=True, slots=True)
class ProductShape:
    """Sizes of a matrix product [rows, inner] x [inner, columns]."""

    rows: int
    inner: int
    columns: int


def product_shape(config: Mapping[str, Any], device_type: str = "cpu", *, cpu_rows: int = CPU_ROWS) -> ProductShape:
    """Return the shape of a model's largest repeated product.

    Sizes are at least `MIN_SIZES` and, on a CPU, at most `MAX_CPU_SIZES`.

    Args:
        config: a model's configuration as JSON; sizes of its text model count. Missing sizes get `DEFAULT_SIZES`.
        device_type: `cpu` or `cuda`.
        cpu_rows: rows on a CPU.
    """
    text = config.get("text_config") or config
    named = (text.get("hidden_size"), text.get("intermediate_size"))
    sizes = [size if isinstance(size, int) else default for size, default in zip(named, DEFAULT_SIZES, strict=True)]
    inner, columns = (max(size, least) for size, least in zip(sizes, MIN_SIZES, strict=True))
    if device_type != "cpu":
        return ProductShape(GPU_ROWS, inner, columns)
    return ProductShape(cpu_rows, min(inner, MAX_CPU_SIZES[0]), min(columns, MAX_CPU_SIZES[1]))


def half_speedup(dtype: torch.dtype, shape: ProductShape, device_type: str = "cpu", *, backward: bool = False) -> float:
    """Return how many times faster a product is in `dtype` than in float32; below 1 it is slower.

    Both are measured the first time that a process asks for a shape, in at most about a second forward; with
    `backward` in a few seconds on CPUs without instructions for `dtype`. Devices that are neither CPU nor CUDA, and
    GPUs that only emulate bfloat16, give 0.
    """
    if device_type == "cuda":
        if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            return 0.0
    elif device_type != "cpu":
        return 0.0
    return _measured(dtype, shape, device_type, backward)


@lru_cache(maxsize=64)
def _measured(dtype: torch.dtype, shape: ProductShape, device_type: str, backward: bool) -> float:
    num_threads = torch.get_num_threads()
    # One thread, because more would also measure the load of the machine; the ratio is that of one core.
    torch.set_num_threads(1)
    try:
        full = product_seconds(torch.float32, shape, device_type, backward=backward)
        return full / product_seconds(dtype, shape, device_type, backward=backward)
    finally:
        torch.set_num_threads(num_threads)


def product_seconds(dtype: torch.dtype, shape: ProductShape, device_type: str, *, backward: bool = False) -> float:
    """Return the seconds of one linear layer of this shape: the fastest of a few runs after a warm-up.

    Args:
        dtype: precision of rows and weights.
        shape: sizes of the product.
        device_type: `cpu` or `cuda`.
        backward: add the two products of the gradients.
    """
    rows = torch.ones(shape.rows, shape.inner, dtype=dtype, device=device_type, requires_grad=backward)
    weight = torch.ones(shape.columns, shape.inner, dtype=dtype, device=device_type, requires_grad=backward)
    gradient = torch.ones(shape.rows, shape.columns, dtype=dtype, device=device_type)
    times: list[float] = []
    while len(times) < MIN_REPEATS or (len(times) < MAX_REPEATS and sum(times) < ENOUGH_SECONDS):
        start = time.perf_counter()
        output = nn.functional.linear(rows, weight)
        if backward:
            torch.autograd.grad(output, (rows, weight), gradient)
        if device_type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def training_speedup(config: Mapping[str, Any], device_type: str) -> float:
    """Return how many times faster forward and backward of a model's largest product are in bfloat16."""
    shape = product_shape(config, device_type, cpu_rows=CPU_TRAINING_ROWS)
    return half_speedup(torch.bfloat16, shape, device_type, backward=True)


def trains_faster_in_bf16(config: Mapping[str, Any], device_type: str) -> bool:
    """Return whether `--bf16 auto` means bfloat16 for a model of this configuration on this device."""
    return training_speedup(config, device_type) >= MIN_TRAINING_SPEEDUP


def raise_slow_weights(model: Any) -> None:
    """Convert half-precision weights on a CPU to float32 where that is faster; `--dtype auto` does this.

    Precision is never lowered. Weights stay as they are if the memory for float32 ones is not available.
    """
    found = {weight.dtype for weight in model.parameters()}
    halves = [dtype for dtype in HALF_PRECISION if dtype in found]
    if model.device.type != "cpu" or not halves:
        return
    shape = product_shape(model.config.to_dict())
    speedup = min(half_speedup(dtype, shape) for dtype in halves)
    if speedup >= 1.0:
        return
    kept = ", ".join(dtype_name(dtype) for dtype in halves)
    slower = f"{kept} products take {1 / speedup:.1f} times as long as float32 ones on this CPU"
    num_bytes = sum(4 * weight.numel() for weight in model.parameters() if weight.dtype in HALF_PRECISION)
    if num_bytes > available_memory():
        logger.warning("%s, but float32 weights need %.1f GiB, which are not available", slower, num_bytes / 2**30)
        return
    nn.Module.float(model)
    logger.info("%s: weights are converted to float32 (--dtype %s keeps them)", slower, kept)


def weights_precision(model: Any) -> str:
    """Return the precision of a model's input embeddings by name, such as `float32`."""
    return dtype_name(model.get_input_embeddings().weight.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as `--dtype` spells it, one of `constants.DTYPES` if listed there."""
    names = {getattr(torch, name): name for name in DTYPES}
    return names.get(dtype, str(dtype).removeprefix("torch."))
