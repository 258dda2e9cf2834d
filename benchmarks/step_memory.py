"""Peak anonymous memory of a training step, above weights, gradients and optimizer state.

    python -m benchmarks.step_memory ours        # prints MiB; run by benchmarks.train_throughput in a process per side

Another thread reads the resident anonymous memory while the step runs; the kernels release the interpreter lock, so
its readings are frequent.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import Questions, say
from benchmarks.sides import SIDES
from benchmarks.workloads import WORKLOADS

STATUS = Path("/proc/self/status")
INTERVAL_S = 0.002


def anonymous_mib() -> float:
    """Return the resident anonymous memory of this process in MiB."""
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    if found is None:
        raise RuntimeError("this system does not report RssAnon; memory is measured on Linux only")
    return int(found.group(1)) / 1024


class Peak(threading.Thread):
    """Thread that keeps the largest reading until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0.0
        self._ends = threading.Event()

    def run(self) -> None:
        """Read the memory repeatedly."""
        while not self._ends.is_set():
            self.largest = max(self.largest, anonymous_mib())
            time.sleep(INTERVAL_S)

    def stop(self) -> float:
        """Stop the thread and return its largest reading."""
        self._ends.set()
        self.join()
        return self.largest


def step_memory(name: str, questions: Questions) -> float:
    """Return the MiB of a step of a side above the memory between steps, with gradients kept."""
    side = SIDES[name]()
    first = questions.sequences[0]
    side.step([first], questions.images)  # the first step allocates library buffers
    for parameter in filter(lambda weight: weight.requires_grad, side.model.parameters()):
        parameter.grad = torch.full_like(parameter, 1e-8)
    side.optimizer.step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = anonymous_mib()
    peak = Peak()
    peak.start()
    side.step(questions.sequences, questions.images)
    return peak.stop() - before


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the side that the first argument names, on one batch of the 8-question workload."""
    name = (sys.argv[1:] if argv is None else argv)[0]
    torch.set_num_threads(2)
    say(f"{step_memory(name, WORKLOADS['8q'].questions(num_batches=1)):.1f}")


if __name__ == "__main__":
    main()
