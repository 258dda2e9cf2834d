"""Trainer callback for metrics and the loss curve, and the log of trained rows."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.errors import DataError
from llava.train.counts import TrainingCounts
from llava.train.run_page import SECONDS_BETWEEN, write_run_page
from llava.utils.json_rows import iter_rows, read_records
from llava.utils.jsonl import append_record, write_atomic, write_records

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss_curve.png"
SHOWN = {"loss": "loss", "learning_rate": "rate", "grad_norm": "gradient"}
"""Logged values that the terminal shows, and their names there."""

SUMMARY_KEY = "train_runtime"
"""Key that only a run's last line contains."""


def peak_memory_gb() -> float:
    """Return the peak memory in GB, of the GPU if available, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class MetricsCallback(TrainerCallback):
    """Callback that appends logs to `metrics.jsonl`, updates the run's page, and finally draws the curve.

    Each line also has throughput, the share of tokens saved by prefix sharing, and peak memory.

    Args:
        folder: folder of the run.
        counts: counts of the trainer, cleared at every log.
        metric_names: names of the metrics of the objective, whose means are logged.
        before_write: called before a line is written; raises if the folder was removed.
    """

    def __init__(
        self,
        folder: Path,
        counts: TrainingCounts,
        metric_names: Sequence[str] = (),
        *,
        before_write: Callable[[], None] | None = None,
    ) -> None:
        self.path = folder / METRICS_FILE
        self.counts = counts
        self.metric_names = tuple(metric_names)
        self.before_write = before_write
        self._since = time.perf_counter()
        self._first_step = 0
        self._page_time = -math.inf

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remove lines of steps after the resumed checkpoint."""
        # These steps are computed again; without this their lines would be there twice.
        self._since = time.perf_counter()
        done = self._first_step = state.global_step
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
        if self.before_write is not None:
            self.before_write()
        if state.global_step == self._first_step:  # resumed at its last step: no loss to average
            logs = {name: value for name, value in logs.items() if name != "train_loss"}
        row = {"step": state.global_step, **logs, **throughput, "peak_memory_gb": round(peak_memory_gb(), 3)}
        append_record(self.path, row)
        if time.monotonic() - self._page_time >= SECONDS_BETWEEN:
            self._write_page(state, is_over=False)

    def _write_page(self, state: TrainerState, *, is_over: bool) -> None:
        self._page_time = time.monotonic()
        rows = list(read_records(self.path))
        write_run_page(self.path.parent, rows, num_steps=state.max_steps, is_over=is_over)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the loss curve and the last version of the page."""
        if state.is_world_process_zero and self.path.exists():
            draw_curve(self.path, self.path.parent / CURVE_FILE)
            self._write_page(state, is_over=True)

    def _throughput(self, device: torch.device) -> dict[str, float]:
        """Return throughput over all ranks; a collective operation, so every rank must log at the same step."""
        counts = self.counts.over_ranks(device, self.metric_names)
        self.counts.clear()
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        if not counts.units:
            return {}
        return {
            "samples_per_second": round(counts.units / seconds, 3),
            "supervised_tokens_per_second": round(counts.supervised / seconds, 2),
            "tokens_per_second": round(counts.tokens / seconds, 1),
            "shared_tokens": round(1 - counts.tokens / max(counts.unshared, 1), 4),
            **({"skipped_rows": counts.skipped} if counts.skipped else {}),
            **counts.means(),
        }


class ChosenCallback(TrainerCallback):
    """Callback that warns if chosen answers become less likely over a log window of preference training.

    Preference losses only see differences, so they may make both answers less likely. Log-ratios are compared, since
    windows hold other pairs.

    Args:
        counts: counts of the trainer since the last log; this callback comes before the one that clears them.
    """

    RATIO = "logratio/chosen"

    def __init__(self, counts: TrainingCounts) -> None:
        self.counts = counts
        self._last = 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Compare the window with the one before."""
        now = self.counts.means().get(self.RATIO)
        if now is None:
            return
        if now < min(self._last, 0.0) and state.is_world_process_zero:
            logger.warning(
                "step %d: chosen answers are becoming less likely (log-ratio per token %.4g, before %.4g); add the "
                "loss sft, or raise --beta",
                state.global_step,
                now,
                self._last,
            )
        self._last = now


class ScreenCallback(TrainerCallback):
    """Callback that prints one line per log: step, loss, learning rate, gradient norm, time left."""

    def __init__(self) -> None:
        self._start, self._first_step = time.perf_counter(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._start, self._first_step = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Log a line."""
        if not state.is_world_process_zero or not logs or SUMMARY_KEY in logs:
            return
        shown = {SHOWN[name]: value for name, value in logs.items() if name in SHOWN}
        shown |= {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if isinstance(value, int | float))
        title = "validation" if any(name.startswith("eval_") for name in logs) else "step"
        logger.info("%s %d/%d  %s%s", title, state.global_step, state.max_steps, values, self._left(state))

    def _left(self, state: TrainerState) -> str:
        """Return the time left at the speed of this run; empty at its end."""
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        if done < 1 or left < 1:
            return ""
        seconds = round((time.perf_counter() - self._start) / done * left)
        return f"  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


def row_ids_file(folder: Path, rank: int) -> Path:
    """Return the path where a rank writes the row numbers of each step (`--log-row-ids`)."""
    return folder / f"row_ids-{rank}.jsonl"


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file, if it exists, with only the wanted rows."""
    if path.exists():
        rows = [row for _, row in iter_rows(path)]
        if any(isinstance(row, DataError) for row in rows):  # the last line may be incomplete after a kill
            logger.warning("%s: dropped an incomplete line", path)
        write_records(path, [row for row in rows if isinstance(row, dict) and wanted(row)])


def draw_curve(metrics: Path, target: Path) -> None:
    """Plot training and validation loss over steps; no file is written if neither was logged at two steps."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(read_records(metrics))
    labels = {"loss": "training", "eval_loss": "validation"}
    curves = {label: [(row["step"], row[name]) for row in rows if name in row] for name, label in labels.items()}
    if max(map(len, curves.values())) < 2:
        return
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    write_atomic(target, buffer.getvalue())
