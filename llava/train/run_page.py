"""Page of a training run, rewritten while it trains: curves of everything that metrics.jsonl has.

metrics.jsonl --curves--> {name: (step, value)} --LineChart--> SVG --run.html--> report.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.train.curves import curve, series
from llava.train.held_out_page import read_cases
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import render_page

PAGE_FILE = "report.html"
SECONDS_BETWEEN = 10.0
"""Shortest time between two versions of the page; a browser reloads it as often while the run is going."""


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
        charts=[curve(name, values) for name, values in series(rows).items()],
        cases=read_cases(place),
        chat=f"llava chat --model {place} --image FILE",
    )
    write_atomic(place / PAGE_FILE, text)
