"""Speed of this machine: threads, and the rate of matrix products in the shapes of the language model."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llava.model.precision import MIN_TRAINING_SPEEDUP, training_speedup

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user chooses the number of threads."""

CPU_ROWS, GPU_ROWS = 512, 8192
"""Rows of the float32 products, about as many as in a training step."""

NUM_REPEATS = 12
SYSTEM = Path("/sys")

Shape = tuple[int, int]
"""Inputs and outputs of a linear layer."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured speed of matrix products.

    Attributes:
        device: `cpu` or `cuda`.
        threads: threads of one product.
        float32: billions of operations per second.
        bfloat16: the same in bfloat16, from the ratio that decides `--bf16 auto`; 0 if unsupported.
    """

    device: str
    threads: int
    float32: float
    bfloat16: float

    @property
    def uses_bfloat16(self) -> bool:
        """Whether bfloat16 is faster by enough to be used."""
        return self.bfloat16 >= MIN_TRAINING_SPEEDUP * self.float32

    @property
    def rate(self) -> float:
        """Operations per second in the precision that is used."""
        return 1e9 * (self.bfloat16 if self.uses_bfloat16 else self.float32)

    def __str__(self) -> str:
        where = "GPU" if self.device == "cuda" else f"CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{where}, float32 {self.float32:.0f} GFLOP/s, bfloat16 {self.bfloat16:.0f} GFLOP/s"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)


def measure_machine(shapes: Sequence[Shape], config: Mapping[str, Any]) -> Machine:
    """Return the speed of matrix products on the device and with the threads that the stages will use.

    Args:
        shapes: shapes of the linear layers of the language model.
        config: its configuration for `precision.product_shape`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = GPU_ROWS if device == "cuda" else CPU_ROWS
    float32 = _gflops(shapes, device, rows)
    speedup = training_speedup(config, device)
    return Machine(device, torch.get_num_threads(), float32, float32 * speedup)


def _gflops(shapes: Sequence[Shape], device: str, rows: int) -> float:
    """Return the best rate of several repeats in billions of operations per second."""
    # The best: a program that runs in this second need not run for the next minutes. On a machine that stays busy the
    # run takes longer than forecast.
    layers = [
        (torch.ones(rows, inputs, device=device), torch.ones(inputs, outputs, device=device))
        for inputs, outputs in shapes
    ]
    operations = sum(2 * rows * inputs * outputs for inputs, outputs in shapes)
    times = []
    for _ in range(NUM_REPEATS + 1):
        start = time.perf_counter()
        for rows_in, weight in layers:
            torch.mm(rows_in, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    # The first repeat also allocates and selects kernels.
    return operations / min(times[1:]) / 1e9


def use_physical_cores() -> None:
    """Set one torch thread for each available physical core, unless the user has chosen a number."""
    if not any(os.environ.get(name) for name in THREAD_VARIABLES):
        torch.set_num_threads(physical_cores())


def physical_cores(root: Path = SYSTEM) -> int:
    """Return the number of physical cores that CPU affinity and cgroup quota allow this process."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {_read(root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in allowed}
    quota, _, period = _read(root / "fs/cgroup/cpu.max").partition(" ")
    limit = -(-int(quota) // int(period)) if quota.isdigit() and period.isdigit() else len(siblings)
    return max(1, min(len(siblings), limit))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
