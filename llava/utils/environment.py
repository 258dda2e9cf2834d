"""`llava env`: versions, devices and memory for bug reports, without user names or paths."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from llava import __version__
from llava.utils.cli import Parser
from llava.utils.terminal import write_out

PACKAGES = (
    "torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "sentencepiece", "pillow", "pydicom",
    "numpy", "deepspeed", "bitsandbytes", "flash-attn", "trl", "wandb", "tensorboard", "trackio",
)  # fmt: skip
VARIABLES = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LLAVA_CACHE", "WANDB_MODE")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report."""
    parser = Parser(prog="llava env", description="Print versions, devices and memory, for bug reports.")
    parser.add_switch("--json", help="print JSON")
    args = parser.parse_args(argv)
    found = environment()
    if args.json:
        write_out(json.dumps(found, indent=2) + "\n")
        return
    width = max(map(len, found))
    write_out("".join(f"{name:<{width}}  {value}\n" for name, value in found.items()))


def environment() -> dict[str, Any]:
    """Return the report by name."""
    return {
        "llava": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        **_hardware(),
        **{name: "set" if name.endswith("CACHE") else os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _hardware() -> dict[str, Any]:
    """Return processor, memory and accelerators."""
    found: dict[str, Any] = {"cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    try:
        import torch
    except ImportError:
        return found
    found["cpu instructions"] = torch.backends.cpu.get_cpu_capability()
    found["cuda"] = torch.version.cuda or "none"
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        found[f"gpu {number}"] = f"{device.name}, {device.total_memory / 2**30:.1f} GiB, {device.major}.{device.minor}"
    if not torch.cuda.device_count():
        found["gpus"] = "none"
    return found
