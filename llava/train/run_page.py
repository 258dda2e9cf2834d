"""Page of a training run, rewritten while it trains: curves of everything that metrics.jsonl has.

metrics.jsonl --series--> {name: (step, value)} --chart--> points of an SVG --run.html--> report.html
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.train.held_out_page import read_cases
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import render_page

PAGE_FILE = "report.html"
SECONDS_BETWEEN = 10.0
"""Shortest time between two versions of the page; a browser reloads it as often while the run is going."""

WIDTH, HEIGHT = 600, 150
MAX_POINTS = 600
"""Size of a chart in its own units, and the largest number of points that it draws."""

FIRST = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb")
"""Charts that come first, in this order."""

TITLES = {
    "loss": "loss",
    "eval_loss": "loss on held-out rows",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "peak_memory_gb": "peak memory, GB",
    "eval_closed_accuracy": "held-out closed accuracy",
    "eval_open_recall": "held-out open recall",
}
HIDDEN = frozenset({"step", "epoch", "total_flos"})


@dataclass(frozen=True, slots=True)
class Chart:
    """Curve for the template: SVG points, and the figures beside it as text."""

    name: str
    points: str
    first: str
    last: str
    low: str
    high: str
    best: str


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values of every number of a metrics file that is logged at two steps or more."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        step = row.get("step")
        for name, value in row.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if isinstance(step, int) and is_number and name not in HIDDEN and not name.startswith("train_"):
                found.setdefault(name, []).append((step, float(value)))
    ordered = sorted(found, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return {name: found[name] for name in ordered if len(found[name]) > 1}


def chart(name: str, values: Sequence[tuple[int, float]]) -> Chart:
    """Return the chart of one series."""
    kept = values[:: -(-len(values) // MAX_POINTS)]
    kept = kept if kept[-1] == values[-1] else [*kept, values[-1]]
    low, high = min(value for _, value in kept), max(value for _, value in kept)
    start, span = kept[0][0], max(kept[-1][0] - kept[0][0], 1)
    height = (high - low) or 1.0
    points = [
        f"{(step - start) / span * WIDTH:.1f},{(1 - (value - low) / height) * (HEIGHT - 10) + 5:.1f}"
        for step, value in kept
    ]
    lower = "loss" in name
    best_step, best = (min if lower else max)(values, key=lambda one: one[1])
    best_text = f"{'lowest' if lower else 'highest'} {best:.4g} at step {best_step}"
    return Chart(
        TITLES.get(name, name), " ".join(points), str(start), str(kept[-1][0]), f"{low:.4g}", f"{high:.4g}", best_text
    )


def write_run_page(folder: str | Path, rows: Sequence[Mapping[str, Any]], *, num_steps: int, is_over: bool) -> None:
    """Write the page of a run.

    Args:
        folder: folder of the run.
        rows: lines of its metrics file.
        num_steps: steps of the whole run.
        is_over: whether training has ended; until then, a browser reloads the page.
    """
    place = Path(folder)
    step = max((int(row["step"]) for row in rows if isinstance(row.get("step"), int)), default=0)
    text = render_page(
        "run.html",
        title=f"Training: {place.resolve().name}",
        state="finished" if is_over else "training",
        step=step,
        num_steps=max(num_steps, step),
        share=f"{100 * step / max(num_steps, step, 1):.1f}",
        seconds=None if is_over else round(SECONDS_BETWEEN),
        charts=[chart(name, values) for name, values in series(rows).items()],
        view=f"0 0 {WIDTH} {HEIGHT}",
        cases=read_cases(place),
        chat=f"llava chat --model {place} --image FILE",
    )
    write_atomic(place / PAGE_FILE, text)
