"""Curves of training runs: series of a metrics file, and their charts for the pages.

metrics.jsonl --series--> {name: [(step, value)]} --curve--> LineChart
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llava.utils.charts import LineChart, Points, line_chart, number_text

FIRST = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb")
"""Charts that come first, in this order."""

TITLES = {
    "loss": "loss",
    "eval_loss": "loss on held-out rows",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "samples_per_second": "rows per second",
    "supervised_tokens_per_second": "trained tokens per second",
    "shared_tokens": "share of tokens saved by sharing",
    "peak_memory_gb": "peak memory, GB",
    "eval_closed_accuracy": "held-out closed accuracy",
    "eval_open_recall": "held-out open recall",
}
HIDDEN = frozenset({"step", "epoch", "total_flos"})


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values of every number of a metrics file that is logged at two steps or more."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        step = row.get("step")
        for name, value in row.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if isinstance(step, int) and is_number and name not in HIDDEN and not name.startswith("train_"):
                found.setdefault(name, []).append((step, float(value)))
    return {name: found[name] for name in ordered(found) if len(found[name]) > 1}


def ordered(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return names of series in the order in which pages show them."""
    return sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def curve(name: str, values: Points) -> LineChart:
    """Return the chart of one series with its best value."""
    step, best = best_of(name, values)
    return line_chart(
        title_of(name), [values], note=f"{direction(name)} {number_text(best, num_digits=4)} at step {step}"
    )


def title_of(name: str) -> str:
    """Return the heading of a series."""
    return TITLES.get(name, name.removeprefix("eval_").replace("_", " ") if name.startswith("eval_") else name)


def direction(name: str) -> str:
    """Return which value of a series is noteworthy: the lowest of losses, the highest of others."""
    return "lowest" if "loss" in name else "highest"


def best_of(name: str, values: Points) -> tuple[int, float]:
    """Return step and value of the noteworthy point of a series."""
    return (min if "loss" in name else max)(values, key=lambda one: one[1])
