"""Dry run (`--dry-run`): token counts, memory, a few real steps and a time forecast; nothing is saved."""

from __future__ import annotations

import statistics
import time
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.data.dataset import RowDataset
from llava.data.encode import as_unit
from llava.train.callbacks import peak_memory_gb

NUM_STEPS = 20
NUM_SAMPLED_ROWS = 200
SHORTENED = {"max_steps": NUM_STEPS, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
"""Training options of a dry run: a few steps without saving or validation."""

BYTES_OF_ADAMW = 8
"""Two float32 moments for each trained parameter."""


class StepTimer(TrainerCallback):
    """Callback that records the seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._start)


def token_table(dataset: RowDataset[Any]) -> str:
    """Return a table of the numbers of tokens in the first rows."""
    num_rows = min(NUM_SAMPLED_ROWS, len(dataset))
    encoded = [sequence for row in range(num_rows) for sequence in as_unit(dataset[row])]
    columns = {
        "tokens": [len(sequence.input_ids) for sequence in encoded],
        "image tokens": [sum(stop - start for start, stop in sequence.image_spans) for sequence in encoded],
        "trained tokens": [sum(label >= 0 for label in sequence.labels) for sequence in encoded],
        "cut tokens": [sequence.num_cut for sequence in encoded],
    }
    lines = [f"{f'first {num_rows} rows':<18}{'smallest':>10}{'median':>10}{'largest':>10}"]
    for name, values in columns.items():
        lines.append(f"{name:<18}{min(values):>10}{statistics.median(values):>10.0f}{max(values):>10}")
    return "\n".join(lines)


def memory_table(model: nn.Module) -> str:
    """Return a table of the memory for weights, gradients and AdamW moments, without activations."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    rows = {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "AdamW moments": sum(p.numel() * BYTES_OF_ADAMW for p in trained),
    }
    return "\n".join(f"{name:<18}{size / 1e9:>10.3f} GB" for name, size in rows.items())


def time_forecast(timer: StepTimer, total_steps: int) -> str:
    """Return the predicted time of the whole run; the first three steps are warm-up and not counted."""
    steady = timer.seconds[min(3, len(timer.seconds) - 1) :]
    middle = statistics.median(steady)
    return (
        f"{len(timer.seconds)} real steps, median {middle:.2f} s; peak memory {peak_memory_gb():.2f} GB; "
        f"the run of {total_steps} steps will take about {total_steps * middle / 3600:.2f} hours"
    )
