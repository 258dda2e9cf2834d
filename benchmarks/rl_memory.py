"""Peak anonymous memory of a step of reinforcement learning, above weights, gradients and optimizer state.

python -m benchmarks.rl_memory ours 1        # prints MiB; run by benchmarks.rl_throughput in a process per side
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence

import torch
import transformers

from benchmarks.common import quiet, say
from benchmarks.rl_sides import FULL, SIDES, RLSide
from benchmarks.step_memory import Peak, anonymous_mib


def step_memory(side: RLSide) -> float:
    """Return the MiB of a step of a side above the memory between steps."""
    side.step(1)  # the first step allocates library buffers
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = anonymous_mib()
    peak = Peak()
    peak.start()
    side.step()
    return peak.stop() - before


def measured(name: str, turns: int) -> float:
    """Return the MiB of a side, measured in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.rl_memory", name, str(turns)]
    found = subprocess.run(words, check=True, capture_output=True, text=True, env=dict(os.environ))
    return float(found.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the side that the first argument names, with the turns of the second."""
    name, turns = (sys.argv[1:] if argv is None else argv)[:2]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with quiet():
        say(f"{step_memory(SIDES[name](FULL, int(turns))):.1f}")


if __name__ == "__main__":
    main()
