"""Short training runs: tiny parts on disk, argument lists, and jobs for `tests.support.ranks`."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import tiny_image, write_tiny_lm, write_tiny_tower, write_tiny_vqa

Rows = list[dict[str, Any]]


def write_parts(folder: Path, *, tie: bool = False) -> Path:
    """Write `lm`, `tower` and `vqa` (12 rows over 3 images)."""
    write_tiny_lm(folder / "lm", tie=tie)
    write_tiny_tower(folder / "tower")
    write_tiny_vqa(folder / "vqa")
    return folder


def write_uneven(folder: Path, num_rows: int = 9, seed: int = 0) -> Path:
    """Write rows of 1 to 60 answer words, every third without an image; return the data file."""
    draw = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    for number in range(num_rows):
        answer = " ".join(draw.choice("abcdefg") for _ in range(1 if number % 2 else draw.randrange(20, 60)))
        has_image = number % 3 != 2
        text = f"Question {number}?"
        turns = [
            {"from": "human", "value": f"<image>\n{text}" if has_image else text},
            {"from": "gpt", "value": answer},
        ]
        row: dict[str, Any] = {"id": str(number), "conversations": turns}
        if has_image:
            tiny_image(number % 4).save(folder / "images" / f"{number % 4}.png")
            row["image"] = f"{number % 4}.png"
        rows.append(row)
    path = folder / "uneven.json"
    path.write_text(json.dumps(rows))
    return path


def arguments(parts: Path, output: Path, **changed: object) -> list[str]:
    """Return the command line of a short run; options with value None are left out."""
    values: dict[str, object] = {
        "model_name_or_path": parts / "lm",
        "vision_tower": parts / "tower",
        "data_path": parts / "vqa" / "train.json",
        "image_folder": parts / "vqa" / "images",
        "output_dir": output,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "model_max_length": 2048,
        "disable_tqdm": True,
        "bf16": False,  # not measured, so tests give the same numbers on every CPU
        **changed,
    }
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def metrics(output: Path) -> Rows:
    """Return the lines of the metrics file."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path, name: str = "loss") -> list[float]:
    """Return a metric of every step that logged it."""
    return [row[name] for row in metrics(output) if name in row]


def steps(output: Path) -> list[int]:
    """Return the step of every loss line."""
    return [row["step"] for row in metrics(output) if "loss" in row]


def train(argv: list[str]) -> None:
    """Run a training, as a job."""
    from llava.train.run import run_sft

    run_sft(argv, image_grouping="off")


def kept_trainer(start: Callable[[], object]) -> Any:
    """Start a training and return its trainer."""
    from llava.train import run as training

    kept: list[Any] = []
    make = training.make_trainer

    def keep(*values: Any, **named: Any) -> Any:
        kept.append(make(*values, **named))
        return kept[-1]

    training.make_trainer = keep
    try:
        start()
    finally:
        training.make_trainer = make
    return kept[-1]


def train_published(argv: list[str], log: Path) -> None:
    """Run `train_mem.py` with both output streams at the end of a file, as a job."""
    from llava.train.train_mem import main

    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    main(argv)


def train_until_killed(argv: list[str], step: int) -> None:
    """Run a training that SIGKILL ends after the metrics line of a step, as a job."""
    from llava.train.callbacks import MetricsCallback

    written = MetricsCallback.on_log

    def kill_after(self: Any, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        written(self, args, state, control, **keywords)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsCallback.on_log = kill_after  # type: ignore[method-assign]
    train(argv)


def train_killed_while_saving(argv: list[str], step: int) -> None:
    """Run a training that SIGKILL ends while it writes `checkpoint-<step>`, as a job."""
    from llava.train import checkpointing

    real: Callable[..., None] = checkpointing.SAVERS["model"]

    def half(model: Any, processor: Any, path: str, **keywords: Any) -> None:
        real(model, processor, path, **keywords)
        if path.endswith(f"checkpoint-{step}"):
            weights = Path(path) / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

    checkpointing.SAVERS["model"] = half
    train(argv)


def saved(output: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder's weight files."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(output.glob("*.safetensors")):
        found |= load_file(file)
    if (output / "non_lora_trainables.bin").is_file():
        found |= torch.load(output / "non_lora_trainables.bin", weights_only=True)
    assert found, f"{output} holds no weights"
    return found
