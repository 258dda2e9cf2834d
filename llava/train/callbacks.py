"""What a run writes beside its weights: metrics, the loss curve, the rows it saw."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.train.trainer import Counts, LlavaTrainer
from llava.utils.jsonl import append, read_records, write_atomic, write_records

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss_curve.png"
SUMMARY_KEY = "train_runtime"
"""Only the line at the end of a run has it."""


def peak_memory_gb() -> float:
    """Largest memory so far in GB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class MetricsCallback(TrainerCallback):
    """Appends every log to `metrics.jsonl` with throughput, sharing and memory; draws the loss curve at the end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE
        self.trainer: LlavaTrainer | None = None
        self._since = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget lines of steps that are computed again after a resume, so that none is doubled."""
        self._since = time.perf_counter()
        done = state.global_step
        if state.is_world_process_zero:
            _keep(self.path, lambda row: row["step"] <= done and SUMMARY_KEY not in row)
        _keep(row_ids_file(self.path.parent, args.process_index), lambda row: row["step"] <= done)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write one line."""
        throughput = self._throughput(args.device)
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, **logs, **throughput, "peak_memory_gb": round(peak_memory_gb(), 3)}
        append(self.path, row)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the loss curve."""
        if state.is_world_process_zero and self.path.exists():
            draw_curve(self.path, self.path.parent / CURVE_FILE)

    def _throughput(self, device: torch.device) -> dict[str, float]:
        """Rates over all ranks; every rank logs at the same time, so that they can add up."""
        if self.trainer is None:
            return {}
        names = self.trainer.source_names
        counts, self.trainer.counts = self.trainer.counts.over_ranks(device, len(names)), Counts()
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        if not counts.sequences:
            return {}
        return {
            "samples_per_second": round(counts.sequences / seconds, 3),
            "supervised_tokens_per_second": round(counts.supervised / seconds, 2),
            "tokens_per_second": round(counts.tokens / seconds, 1),
            "shared_tokens": round(1 - counts.tokens / max(counts.unshared, 1), 4),
            **({"skipped_rows": counts.skipped} if counts.skipped else {}),
            **_loss_by_source(names, counts),
        }


def _loss_by_source(names: Sequence[str], counts: Counts) -> dict[str, float]:
    """`loss/NAME` of every source that rows came from: the mean over its supervised tokens."""
    if counts.by_source is None:
        return {}
    sums, weights = counts.by_source.tolist()
    found = zip(names, sums, weights, strict=True)
    return {f"loss/{name}": round(total / weight, 6) for name, total, weight in found if weight}


def row_ids_file(folder: Path, rank: int) -> Path:
    """Where a rank lists the numbers of the rows of each step (`--log_row_ids`)."""
    return folder / f"row_ids-{rank}.jsonl"


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the other lines of a file, if there is one."""
    if path.exists():
        write_records(path, [row for row in _whole_lines(path) if wanted(row)])


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file whose last line may have been cut off by a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            logger.warning("%s: dropped a torn line", path)
    return rows


def draw_curve(metrics: Path, target: Path) -> None:
    """Plot training and validation loss over steps."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(read_records(metrics))
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss per supervised token")
    axes.grid(alpha=0.3)
    if axes.lines:  # a run may end before it logs
        axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    write_atomic(target, buffer.getvalue())
