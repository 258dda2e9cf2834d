"""Sides of the benchmark `checkpoint_io`, each run in a process.

    python -m benchmarks.checkpoint_sides SIDE WORD...      run by benchmarks.checkpoint_io

The process imports, prints `ready`, waits for a line on standard input, and prints its measurements as a JSON line.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedModel

from benchmarks import common
from llava.model import apply_delta
from llava.model.checkpoint import export_hf
from llava.model.checkpoint.load import load_checkpoint

assert export_hf, "imported here, so that no side counts the import"
BYTES_PER_GB = 10**9


def delta_ours(base: str, delta: str, target: str, shard_bytes: str, form: str) -> dict[str, float]:
    """Run `python -m llava.model.apply_delta`."""
    words = ["--base", base, "--delta", delta, "--target", target]
    words += ["--max-shard-gb", str(int(shard_bytes) / BYTES_PER_GB)]
    apply_delta.main([*words, "--bin"] if form == "bin" else words)
    return {}


@torch.no_grad()
def delta_both_models(base: str, delta: str, target: str, shard_bytes: str, form: str) -> dict[str, float]:
    """Add one loaded model to another in place and save it, as the originals do."""
    old = LlamaForCausalLM.from_pretrained(base, dtype=torch.float16, low_cpu_mem_usage=True)
    new = LlamaForCausalLM.from_pretrained(delta, dtype=torch.float16, low_cpu_mem_usage=True)
    known = old.state_dict()
    for name, weight in new.state_dict().items():
        other = known[name]
        weight.data[tuple(slice(0, size) for size in other.shape)] += other
    if form == "safetensors":
        new.save_pretrained(target, max_shard_size=int(shard_bytes))
    else:
        _save_bin(new, Path(target), int(shard_bytes))
    return {}


def _save_bin(model: PreTrainedModel, folder: Path, shard_bytes: int) -> None:
    """Write `.bin` shards as `save_pretrained` did before it wrote only safetensors."""
    state = model.state_dict()
    pattern = "pytorch_model{suffix}.bin"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=shard_bytes)
    folder.mkdir()
    for file, names in split.filename_to_tensors.items():
        torch.save({name: state[name] for name in names}, folder / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)


def load_ours(folder: str) -> dict[str, float]:
    """Load a checkpoint in the format of the originals with `llava.model.checkpoint.load`."""
    start = time.perf_counter()
    model = load_checkpoint(folder).model
    return _read_all(model, time.perf_counter() - start)


def load_plain(folder: str) -> dict[str, float]:
    """Load model and processor in the format of transformers; the processor is also timed alone."""
    start = time.perf_counter()
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    middle = time.perf_counter()
    AutoProcessor.from_pretrained(folder)
    stop = time.perf_counter()
    return {**_read_all(model, stop - start), "processor": stop - middle}


@torch.no_grad()
def _read_all(model: PreTrainedModel, seconds: float) -> dict[str, float]:
    """Return the seconds to read every weight once, and the sum of their bits."""
    # Weights may still be in mapped files. The row of the placeholder is excluded, because the originals lack it.
    start = time.perf_counter()
    weights = [weight[: common.IMAGE_TOKEN_ID].reshape(-1).view(torch.int64) for weight in model.parameters()]
    total = sum(int(weight.sum()) for weight in weights)
    return {"loaded": seconds, "read": time.perf_counter() - start, "sum": total}


SIDES: dict[str, Callable[..., dict[str, float]]] = {
    "delta_ours": delta_ours,
    "delta_both_models": delta_both_models,
    "load_ours": load_ours,
    "load_plain": load_plain,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the side that the first argument names."""
    name, *arguments = sys.argv[1:] if argv is None else argv
    torch.set_num_threads(2)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    _tell("ready")
    sys.stdin.readline()
    start = time.perf_counter()
    values = SIDES[name](*arguments)
    _tell(json.dumps({"seconds": time.perf_counter() - start, **values}))


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
