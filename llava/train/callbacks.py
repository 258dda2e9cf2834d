"""Trainer callback for metrics and the loss curve, and the log of trained rows."""

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

from llava.train.trainer import TrainingCounts
from llava.utils.jsonl import append_record, read_records, write_atomic, write_records

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss_curve.png"
SUMMARY_KEY = "train_runtime"
"""Key that only the last line of a run has."""


def peak_memory_gb() -> float:
    """Return the peak memory in GB, of the GPU if available, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class MetricsCallback(TrainerCallback):
    """Callback that appends every log to `metrics.jsonl` and draws the loss curve after training.

    Each line also has throughput, the share of tokens saved by prefix sharing, and peak memory.

    Args:
        folder: folder of the run.
        counts: counts of the trainer, cleared at every log.
        source_names: names of the sources of a mixture; the loss of each is logged.
    """

    def __init__(self, folder: Path, counts: TrainingCounts, source_names: Sequence[str] = ()) -> None:
        self.path = folder / METRICS_FILE
        self.counts = counts
        self.source_names = tuple(source_names)
        self._since = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remove lines of steps after the resumed checkpoint."""
        # These steps are computed again; without this their lines would be there twice.
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
        """Append one line to `metrics.jsonl`."""
        throughput = self._throughput(args.device)
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, **logs, **throughput, "peak_memory_gb": round(peak_memory_gb(), 3)}
        append_record(self.path, row)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the loss curve."""
        if state.is_world_process_zero and self.path.exists():
            draw_curve(self.path, self.path.parent / CURVE_FILE)

    def _throughput(self, device: torch.device) -> dict[str, float]:
        """Return throughput over all ranks; a collective operation, so every rank must log at the same step."""
        counts = self.counts.over_ranks(device, len(self.source_names))
        self.counts.clear()
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
            **_loss_by_source(self.source_names, counts),
        }


def _loss_by_source(names: Sequence[str], counts: TrainingCounts) -> dict[str, float]:
    """Return `loss/NAME`, the mean over supervised tokens, of each source with trained rows."""
    if counts.by_source is None:
        return {}
    sums, weights = counts.by_source.tolist()
    found = zip(names, sums, weights, strict=True)
    return {f"loss/{name}": round(total / weight, 6) for name, total, weight in found if weight}


def row_ids_file(folder: Path, rank: int) -> Path:
    """Return the path where a rank writes the row numbers of each step (`--log-row-ids`)."""
    return folder / f"row_ids-{rank}.jsonl"


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file, if it exists, with only the wanted rows."""
    if path.exists():
        write_records(path, [row for row in _whole_lines(path) if wanted(row)])


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file whose last line may be incomplete after a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            logger.warning("%s: dropped an incomplete line", path)
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
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token")
    axes.grid(alpha=0.3)
    if axes.lines:  # empty if the run ended before its first log
        axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    write_atomic(target, buffer.getvalue())
