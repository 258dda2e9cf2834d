"""Peak anonymous memory of a preference step, above weights, gradients and optimizer state.

python -m benchmarks.pair_memory ours        # prints MiB; run by benchmarks.dpo_throughput in a process per side
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.common import say
from benchmarks.pair_sides import TRL, WORKLOADS, Ours, Padded, PairBatch, Side, Workload, random_pairs
from benchmarks.step_memory import Peak, anonymous_mib

SIDES: dict[str, Callable[[], Side]] = {"ours": Ours, "padded": Padded, "trl": TRL}


def step_memory(side: Side, batch: PairBatch) -> float:
    """Return the MiB of a step of a side above the memory between steps."""
    side.step(random_pairs(Workload(1, 1, 30)))  # the first step allocates library buffers
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = anonymous_mib()
    peak = Peak()
    peak.start()
    side.step(batch)
    return peak.stop() - before


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the side that the first argument names."""
    name = (sys.argv[1:] if argv is None else argv)[0]
    torch.set_num_threads(1)
    say(f"{step_memory(SIDES[name](), random_pairs(WORKLOADS['1p30'])):.1f}")


if __name__ == "__main__":
    main()
