"""`llava compare`: training runs side by side, as text, as a page or as JSON.

    metrics.jsonl --> figures, curves; resolved_arguments.json, provenance.json --> settings that differ;
    results.json of each evaluation in the folder of a run --> scores on the same questions

Scores have the interval of each run alone; the paired difference of two runs is that of `llava eval --compare`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llava.constants import ARGUMENTS_FILE
from llava.errors import ConfigError, DataError
from llava.train.curves import best_of, direction, ordered, series, title_of
from llava.utils.charts import MAX_LINES, LineChart, line_chart
from llava.utils.cli import Parser
from llava.utils.json_rows import read_records
from llava.utils.jsonl import read_object, write_atomic, write_json
from llava.utils.reporting import fact_lines, render_page, text_table
from llava.utils.terminal import write_out

METRICS, PROVENANCE, RESULTS = "metrics.jsonl", "provenance.json", "results.json"

NOT_SETTINGS = frozenset(
    {"output_dir", "logging_dir", "run_name", "report_to", "plugins", "command", "options", "weights_sha256"}
)
"""Arguments and facts that differ between any two runs, or repeat others."""

NOTHING = "-"
HASH = re.compile("[0-9a-f]{40,64}")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Facts in the folder of a training run.

    Attributes:
        name: name of the run on the page.
        curves: steps and values of each logged number.
        figures: last, best or mean values by title.
        settings: arguments and facts by option or name.
        scores: by evaluation (its questions), the text of each score.
    """

    name: str
    curves: dict[str, list[tuple[int, float]]]
    figures: dict[str, str]
    settings: dict[str, str]
    scores: dict[str, dict[str, str]]


def read_run(folder: Path, name: str) -> RunRecord:
    """Return the facts in the folder of a run.

    Raises:
        DataError: it is not the output folder of a training run.
    """
    if not (folder / ARGUMENTS_FILE).is_file():
        raise DataError(f"{folder}: no {ARGUMENTS_FILE}; expected the output folder of `llava train`")
    rows = list(read_records(folder / METRICS)) if (folder / METRICS).is_file() else []
    facts = read_object(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    groups = read_object(folder / ARGUMENTS_FILE).values()
    options = {f"--{key.replace('_', '-')}": part for group in groups for key, part in group.items() if _counts(key)}
    facts = {key: part for key, part in facts.items() if _counts(key) and f"--{key.replace('_', '-')}" not in options}
    curves = series(rows)
    return RunRecord(
        name, curves, _figures(rows, curves), _shortened(fact_lines_of(options) + fact_lines(facts)), _scores(folder)
    )


def _counts(name: str) -> bool:
    return name not in NOT_SETTINGS


def fact_lines_of(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return options and their values as text; the names stay as a command line has them."""
    return [(name, text) for name, value in options.items() for _, text in fact_lines({"": value})]


def _shortened(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return names and texts, of hashes the first digits."""
    return {name: text[:12] if HASH.fullmatch(text) else text for name, text in pairs}


def _figures(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, list[tuple[int, float]]]) -> dict[str, str]:
    """Return the figures of a run: steps, last and best loss, best held-out values, speed, memory, time."""
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    found = {"steps": f"{max(steps):,}"} if steps else {}
    if losses := [row["loss"] for row in rows if isinstance(row.get("loss"), int | float)]:
        found["loss, last"] = f"{losses[-1]:.4g}"
    held_out = dict.fromkeys(name for row in rows for name in row if name.startswith("eval_"))
    for name in ordered(held_out):
        points = [(row["step"], float(row[name])) for row in rows if isinstance(row.get(name), int | float)]
        if points:
            step, best = best_of(name, points)
            found[f"{title_of(name)}, {direction(name)}"] = f"{best:.4g} (step {step:,})"
    if speeds := [value for _, value in curves.get("tokens_per_second", [])]:
        found["tokens per second, median"] = f"{median(speeds):,.0f}"
    if memory := [row["peak_memory_gb"] for row in rows if "peak_memory_gb" in row]:
        found["peak memory, GB"] = f"{max(memory):.2f}"
    if seconds := [row["train_runtime"] for row in rows if "train_runtime" in row]:
        found["time, s"] = f"{seconds[-1]:,.0f}"
    return found


def _scores(folder: Path) -> dict[str, dict[str, str]]:
    """Return the strict scores of every evaluation in the folder of a run, by the questions that it asked."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob(f"*/{RESULTS}")):
        report = read_object(path)
        strict = report.get("scores", {}).get("strict", {})
        facts = report.get("provenance", {})
        asked = facts.get("data", {}).get("questions", {})
        limit = f", the first {facts['limit']}" if facts.get("limit") else ""
        name = f"{asked.get('file', path.parent.name)} (SHA-256 {str(asked.get('sha256', 'unknown'))[:8]}{limit})"
        found[name] = {title: _score_text(row) for title, row in strict.items() if row["answered"]["num_items"]}
    return found


def _score_text(row: Mapping[str, Any]) -> str:
    """Return a score with its interval, and that on the gray image."""
    value, blank = row["answered"], row.get("blank")
    text = f"{value['value']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"
    return text if blank is None else f"{text}, gray {blank['value']:.1f}"


def comparison(runs: Sequence[RunRecord]) -> dict[str, list[tuple[str, list[str]]]]:
    """Return the tables of a comparison: heading to rows, each a title and the text of every run.

    Settings are those that differ; scores of an evaluation are shown if any run has it.
    """
    tables = {"Figures": _rows([run.figures for run in runs])}
    settings = _rows([run.settings for run in runs])
    tables["Settings that differ"] = [row for row in settings if len(set(row[1])) > 1]
    for name in dict.fromkeys(name for run in runs for name in run.scores):
        tables[f"Scores on {name}"] = _rows([run.scores.get(name, {}) for run in runs])
    return tables


def _rows(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Return a row for each name of any column, in the order of their appearance."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, NOTHING) for column in columns]) for name in names]


def charts(runs: Sequence[RunRecord]) -> list[LineChart]:
    """Return a chart of each series that any run has, with a line for every run."""
    names = ordered({name: None for run in runs for name in run.curves})
    return [line_chart(title_of(name), [run.curves.get(name, []) for run in runs]) for name in names]


def make_parser() -> Parser:
    """Return the parser of `llava compare`."""
    parser = Parser(prog="llava compare", description="Compare training runs: curves, figures, settings, scores.")
    parser.add_argument("runs", nargs="+", type=Path, help=f"output folders of `llava train`, two to {MAX_LINES}")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the curves, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as JSON, too")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Compare runs.

    Raises:
        ConfigError: fewer than two or more than `MAX_LINES` runs are given.
        DataError: a folder is not one of a training run.
    """
    args = make_parser().parse_args(argv)
    if not 2 <= len(args.runs) <= MAX_LINES:
        raise ConfigError(f"{len(args.runs)} given; expected two to {MAX_LINES} output folders of `llava train`")
    names = [folder.resolve().name for folder in args.runs]
    unique = len(set(names)) == len(names)
    runs = [read_run(folder, name if unique else str(folder)) for folder, name in zip(args.runs, names, strict=True)]
    tables = comparison(runs)
    write_out(comparison_text(runs, tables))
    if args.json is not None:
        write_json(args.json, {"runs": [run.name for run in runs], "tables": {k: dict(v) for k, v in tables.items()}})
        write_out(f"\nresult: {args.json}\n")
    if args.html is not None:
        write_page(args.html, runs, tables)
        write_out(f"\npage: {args.html}\n")


def comparison_text(runs: Sequence[RunRecord], tables: Mapping[str, list[tuple[str, list[str]]]]) -> str:
    """Return the tables as text."""
    parts = []
    for heading, rows in tables.items():
        cells = [[name, *texts] for name, texts in rows]
        body = text_table(["", *(run.name for run in runs)], cells) if cells else "none"
        parts.append(f"{heading}\n{body}\n")
    return "\n".join(parts)


def write_page(path: Path, runs: Sequence[RunRecord], tables: Mapping[str, list[tuple[str, list[str]]]]) -> None:
    """Write the page of a comparison."""
    text = render_page(
        "compare.html",
        title=f"Runs: {', '.join(run.name for run in runs)}",
        names=[run.name for run in runs],
        tables=[(heading, [[name, *texts] for name, texts in rows]) for heading, rows in tables.items()],
        charts=charts(runs),
    )
    write_atomic(path, text)
