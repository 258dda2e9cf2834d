"""`llava reports compare`: compare prediction files on the same references."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import ConfigError
from llava.eval.reports.cli import add_input_options, check_options, inputs_of, stamp
from llava.eval.reports.compare import check_same_reports, compare_figures
from llava.eval.reports.figures import ReportFigure
from llava.eval.reports.given import read_extra_scores
from llava.eval.reports.rows import read_pairs
from llava.eval.reports.score import all_figures, finite, patients
from llava.eval.reports.scorers import run_scorers, scorer_names
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.jsonl import write_json
from llava.utils.reporting import text_table


def _parser() -> Parser:
    parser = Parser(
        prog="llava reports compare",
        description="Compare predicted reports of two or more systems on the same references, first minus second.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="prediction files with the same ids and references")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of compare.json")
    for name, text in (
        ("labels", "given labels"),
        ("radgraph-annotations", "graphs"),
        ("extra-scores", "other scores"),
    ):
        parser.add_argument(f"--{name}", nargs="+", metavar="FILE", help=f"{text}, one file per FILE")
    add_input_options(parser)
    return parser


def compare_main(argv: Sequence[str] | None = None) -> None:
    """Compare prediction files, print the differences and write compare.json."""
    args = _parser().parse_args(argv)
    log.setup_logging()
    check_options(args)
    given = _given(args)
    reports = [read_pairs(file) for file in args.files]
    check_same_reports(args.files, reports)
    systems, status, stamps = [], {}, []
    for file, pairs, (labels, graphs, extra) in zip(args.files, reports, given, strict=True):
        inputs = inputs_of(args, pairs, file, [] if labels is None else [labels], graphs)
        scored = run_scorers(inputs, scorer_names(args.scorers))
        others = [] if extra is None else read_extra_scores(extra, num_reports=len(pairs), reports=file)
        systems.append(all_figures(scored, others))
        status = scored.status
        stamps.append(stamp(args, inputs, ["llava reports compare", *(sys.argv[1:] if argv is None else argv)]))
    results = compare_figures(systems, patients(reports[0], by=args.cluster), num_draws=args.num_resamples)
    content = {
        "num_reports": len(reports[0]),
        "files": [Path(file).name for file in args.files],
        "differences": results[0]["differences"],
        "pairs": results,
        "scorers": status,
        "provenance": stamps,
    }
    write_json(args.out / "compare.json", finite(content))
    sys.stdout.write(_text(args.files, results, systems))


def _given(args: Namespace) -> list[tuple[str | None, Path | None, str | None]]:
    """Return the files of labels, graphs and other scores of each prediction file.

    Raises:
        ConfigError: there is one prediction file only, or another number of given files.
    """
    num = len(args.files)
    if num < 2:
        raise ConfigError(f"expected at least two prediction files, got {num}")
    columns: list[list[str | None]] = []
    for name in ("labels", "radgraph_annotations", "extra_scores"):
        values = getattr(args, name) or []
        if values and len(values) != num:
            raise ConfigError(
                f"--{name.replace('_', '-')}: got {len(values)} files for {num} prediction files; expected {num}"
            )
        columns.append(values or [None] * num)
    return [(labels, graphs and Path(graphs), extra) for labels, graphs, extra in zip(*columns, strict=True)]


def _text(files: Sequence[str], results: Sequence[Mapping[str, Any]], systems: Sequence[Sequence[ReportFigure]]) -> str:
    parts = []
    for result in results:
        one, other = (Path(files[result[side]]).name for side in ("first", "second"))
        rows = [
            [
                name,
                f"{cell['first']:.4f}",
                f"{cell['second']:.4f}",
                f"{cell['value']:+.4f}",
                f"{cell['ci_l']:+.4f} to {cell['ci_h']:+.4f}",
                f"{cell['p_value']:.4f}",
                f"{cell['p_holm']:.4f}",
            ]
            for name, cell in result["differences"].items()
        ]
        headers = ["metric", "first", "second", "difference", "95 % interval", "p", "p (Holm)"]
        parts.append(f"{one} minus {other}\n{text_table(headers, rows)}\n")
    return "\n".join(parts)
