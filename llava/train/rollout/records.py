"""Records of reinforcement learning: `rollouts.jsonl`, counts for `metrics.jsonl`, and curves."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.train.callbacks import METRICS_FILE
from llava.train.counts import TrainingCounts
from llava.train.rollout.episodes import METRIC_NAMES, metrics_of
from llava.train.rollout.files import ROLLOUTS_FILE
from llava.train.rollout.rollout import Rollout
from llava.utils.json_rows import iter_rows, read_records
from llava.utils.jsonl import records_text, write_atomic, write_records

CURVES_FILE = "rollout_curves.png"

Point = tuple[float, float]
"""Step and value."""

SECONDS = ("seconds/rollout", "seconds/scoring", "seconds/update")
NAMES = (*METRIC_NAMES, "kl_coef", "rollout_slots", "update_rows", *SECONDS)
"""Names of the metrics of a rollout; the objective adds its own."""

CURVES = {
    "reward": ("reward", "score"),
    "components": ("reward/correctness", "reward/consistency", "reward/bonus", "reward/length", "reward/format"),
    "accuracy": ("A_Q", "A_C", "contradictions"),
    "answers": ("no_match", "hedged", "void", "unfinished"),
    "policy": ("kl", "clip_share", "engine_difference"),
    "entropy": ("entropy",),
    "groups": ("equal_groups", "shared_tokens"),
    "seconds": SECONDS,
}
"""Panels of the curves, and the metrics of each."""


def keep_rollouts(path: Path, last: int) -> None:
    """Remove the rollouts after step `last`, which a resumed run makes again."""
    if not path.exists():
        return
    rows = [row for _, row in iter_rows(path)]
    write_records(path, [row for row in rows if isinstance(row, dict) and row.get("step", last + 1) <= last])


class RolloutWriter:
    """Callable that writes a rollout before it is learned from, and counts its metrics.

    Args:
        folder: folder of the run.
        counts: counts of the trainer.
        rank: rank of this process; the first writes.
        slots: dialogues that a process generates at a time.
    """

    def __init__(self, folder: Path, counts: TrainingCounts, *, rank: int, slots: int) -> None:
        self.path = folder / ROLLOUTS_FILE
        self.counts = counts
        self.rank = rank
        self.slots = slots

    def __call__(self, found: Rollout, kl_coef: float) -> None:
        """Write and count a rollout."""
        if self.rank == 0:
            text = records_text([episode.record(found.step) for episode in found.episodes])
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
            self._add({name: list(pair) for name, pair in metrics_of(found.episodes).items()})
        self._add({"kl_coef": [kl_coef, 1.0], "rollout_slots": [float(self.slots), 1.0]})
        self._add({f"seconds/{name}": [seconds, 1.0] for name, seconds in found.seconds.items()})

    def _add(self, pairs: dict[str, list[float]]) -> None:
        self.counts.add_metrics({name: torch.tensor(pair, dtype=torch.float64) for name, pair in pairs.items()})


class RolloutCallback(TrainerCallback):
    """Callback that measures updates and draws the curves after training.

    Args:
        folder: folder of the run.
        counts: counts of the trainer.
    """

    def __init__(self, folder: Path, counts: TrainingCounts) -> None:
        self.folder = folder
        self.counts = counts
        self._started = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of an update, after its batch was made."""
        self._started = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the seconds of an update."""
        seconds = time.perf_counter() - self._started
        self.counts.add_metrics({"seconds/update": torch.tensor([seconds, 1.0], dtype=torch.float64)})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the curves."""
        metrics = self.folder / METRICS_FILE
        if state.is_world_process_zero and metrics.exists():
            draw_curves(metrics, self.folder / CURVES_FILE)


def curve_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """Return the steps at which a metric was logged, with its values."""
    return [(row["step"], row[name]) for row in rows if name in row]


def draw_curves(metrics: Path, target: Path) -> None:
    """Plot the metrics of the rollouts over steps, one panel for each group of `CURVES`.

    No file is written if no metric was logged at two steps.
    """
    rows = list(read_records(metrics))
    panels = {
        title: {name.rpartition("/")[2]: curve_of(rows, name) for name in names} for title, names in CURVES.items()
    }
    draw_panels(panels, target, num_columns=4)


def draw_panels(panels: Mapping[str, Mapping[str, Sequence[Point]]], target: Path, *, num_columns: int) -> None:
    """Plot curves over optimizer steps to a PNG file, by title of the panel and label.

    No file is written if no curve has two points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if max(len(points) for curves in panels.values() for points in curves.values()) < 2:
        return
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(3.5 * num_columns, 3 * num_rows))
    for number, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        for label, points in curves.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=label)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.tight_layout()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    write_atomic(target, buffer.getvalue())
