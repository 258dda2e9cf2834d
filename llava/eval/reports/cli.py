"""`llava reports score` and `llava/eval/rrg_eval/run.py`: score predicted reports against references."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import ConfigError
from llava.eval.reports.figures import NUM_DRAWS, PUBLISHED_SEED, SACREBLEU_SEED
from llava.eval.reports.given import read_extra_scores
from llava.eval.reports.output import console_text, metrics_json, write_results
from llava.eval.reports.radgraph import CASES
from llava.eval.reports.rows import STDIN, ReportPair, read_pairs
from llava.eval.reports.score import CLUSTERS, ReportScores, score_reports
from llava.eval.reports.scorers import DEFAULT_SCORERS, SCORERS, ScoreInputs, scorer_names
from llava.generation.fingerprint import read_settings, sidecar_path
from llava.utils import log
from llava.utils.cli import Parser, check_folder
from llava.utils.lookup import require
from llava.utils.provenance import provenance_fields

logger = logging.getLogger(__name__)

RESULTS = ("main.csv", "breakdown_p.csv", "breakdown_n.csv", "per_sample.jsonl", "metrics.json", "report.html")


def bleu_scale(text: str) -> float:
    """Return the scale of BLEU: 100 or 1."""
    if text not in ("100", "1"):
        raise ArgumentTypeError(f"got {text!r}, expected 100 or 1")
    return float(text)


def add_input_options(parser: Parser) -> None:
    """Add the options that `score` and `compare` share."""
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--scorers", metavar="A,B", help=f"of {', '.join(SCORERS)}; default: {', '.join(DEFAULT_SCORERS)}"
    )
    group.add_argument("--radgraph-case", choices=CASES, default="new", help="legacy: as radgraph up to 0.1.18")
    group.add_argument("--chexbert", type=Path, metavar="FOLDER", help="chexbert.pth, config.json and vocab.txt")
    group.add_argument("--radgraph-model", type=Path, metavar="FOLDER", help="unpacked RadGraph model")
    group.add_argument("--bleu-scale", type=bleu_scale, default=100.0, metavar="{100,1}", help="largest value of BLEU")
    group.add_argument("--cluster", choices=CLUSTERS, default="patient", help="what the clustered intervals resample")
    group.add_argument("--num-resamples", type=int, default=NUM_DRAWS, help="resamples of the intervals")


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Score predicted reports against their references.",
        epilog="example: python llava/eval/rrg_eval/run.py predictions.jsonl --output-dir scores",
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="prediction and reference per row: JSON lines, JSON array or CSV; - for stdin",
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="FILE", help="given labels of both sides, or two CheXpert tables"
    )
    parser.add_argument("--radgraph-annotations", type=Path, metavar="FILE", help="given graphs of both sides")
    parser.add_argument("--extra-scores", type=Path, metavar="FILE", help="per-report values of other tools")
    add_input_options(parser)
    parser.add_switch("--report-chexbert-f1", help="also print the four-way table of each finding")
    parser.add_switch("--bootstrap-ci", default=True, help="compute intervals")
    parser.add_argument("--output-dir", type=Path, default=Path(), help="folder of the result files")
    parser.add_argument("--run-name", default="mimic_cxr_eval", help="name of the run in results and trackers")
    parser.add_switch("--wandb", help="log the figures to wandb")
    parser.add_switch("--page", default=True, help="write report.html, which contains the reports")
    parser.add_argument("--image-folder", type=Path, help="folder of the images shown on the page")
    parser.add_argument("--num-examples", type=int, default=100, help="reports on the page, worst first")
    return parser


def score_main(argv: Sequence[str] | None = None, *, prog: str = "llava reports score") -> None:
    """Score a file of reports, print the tables and write the result files."""
    args = _parse(prog, argv)
    log.setup_logging()
    check_options(args)
    wandb = require("wandb", "train") if args.wandb else None
    inputs = inputs_of(args, read_pairs(args.file), args.file, args.labels, args.radgraph_annotations)
    extra = []
    if args.extra_scores is not None:
        extra = read_extra_scores(args.extra_scores, num_reports=len(inputs.pairs), reports=inputs.file)
    scores = score_reports(
        inputs,
        scorer_names(args.scorers),
        extra=extra,
        intervals=args.bootstrap_ci,
        cluster=args.cluster,
        four_way=args.report_chexbert_f1,
        num_draws=args.num_resamples,
    )
    facts = stamp(args, inputs, [prog, *(sys.argv[1:] if argv is None else argv)], run_name=args.run_name)
    write_results(args.output_dir, scores, facts)
    if args.page:
        _write_page(args, inputs, scores, facts)
    sys.stdout.write(console_text(scores))
    if wandb is not None:
        _log_wandb(wandb, args.run_name, scores, facts)


def _parse(prog: str, argv: Sequence[str] | None) -> Namespace:
    """Return the options; FILE may also be the last word after `--labels`."""
    parser = _parser(prog)
    args: Namespace = parser.parse_args(argv)
    labels, file = list(args.labels or ()), args.file
    if file is None and len(labels) > 1:
        file = labels.pop()
    if file is None:
        parser.error("expected FILE, the predictions and references")
    return Namespace(**{**vars(args), "labels": labels, "file": file})


def check_options(args: Namespace) -> None:
    """Check options that do not depend on the files.

    Raises:
        ConfigError: a number is out of range, or more than two label files were passed.
    """
    check_folder(getattr(args, "image_folder", None), "--image-folder")
    if args.num_resamples < 1:
        raise ConfigError(
            f"--num-resamples is {args.num_resamples}; expected at least 1 (no intervals: --bootstrap-ci False)"
        )


def inputs_of(
    args: Namespace, pairs: Sequence[ReportPair], file: str, labels: Sequence[str], graphs: Path | None
) -> ScoreInputs:
    """Return the inputs of the scorers; one word with a comma names two label files."""
    paths = [part for word in labels for part in word.split(",") if part]
    return ScoreInputs(
        pairs,
        "<stdin>" if file == STDIN else str(file),
        labels=tuple(paths),
        graphs=graphs,
        radgraph_case=args.radgraph_case,
        chexbert=args.chexbert,
        radgraph_model=args.radgraph_model,
        bleu_scale=args.bleu_scale,
    )


def stamp(args: Namespace, inputs: ScoreInputs, command: Sequence[str], **facts: Any) -> dict[str, Any]:
    """Return the protocol of a result: data, seeds and the variants of all metrics."""
    files: dict[str, str | Path] = {} if inputs.file == "<stdin>" else {"reports": inputs.file}
    files |= {f"labels {number}": path for number, path in enumerate(inputs.labels)}
    if inputs.graphs is not None:
        files["graphs"] = inputs.graphs
    return provenance_fields(
        data=files,
        command=command,
        variants={
            "ROUGE": "rouge-score, no stemming, 0-1",
            "BLEU": f"sacrebleu 13a, exp, no effective order, 0-{inputs.bleu_scale:g}",
            "label F1": "with +: uncertain as positive, without: as negative; absent classes count as 0",
            "F1-RadGraph": f"partial; words {inputs.radgraph_case} case",
        },
        seeds={"percentile": PUBLISHED_SEED, "sacrebleu": SACREBLEU_SEED, "clustered": 0},
        num_resamples=args.num_resamples,
        cluster=args.cluster,
        **_protocol(inputs),
        **facts,
    )


def _protocol(inputs: ScoreInputs) -> dict[str, Any]:
    """Return split, prompt, loader and section rule as stated by the rows or the settings file."""
    rows = [pair.meta for pair in inputs.pairs]
    found: dict[str, Any] = {}
    for name in ("split", "loader", "section", "generate_method", "view"):
        values = sorted({str(row[name]) for row in rows if row.get(name) is not None})
        found[name] = values if 0 < len(values) <= 10 else None
    if sidecar_path(inputs.file).is_file():
        found["predictions"] = read_settings(inputs.file)
    return {"protocol": found}


def _write_page(args: Namespace, inputs: ScoreInputs, scores: ReportScores, facts: Mapping[str, Any]) -> None:
    from llava.eval.reports.page import write_reports_page

    write_reports_page(
        args.output_dir / "report.html",
        inputs,
        scores,
        facts,
        image_folder=args.image_folder,
        num_examples=args.num_examples,
    )


def _log_wandb(wandb: Any, run_name: str, scores: ReportScores, facts: Mapping[str, Any]) -> None:
    run = wandb.init(name=run_name, config={"provenance": dict(facts)})
    content = metrics_json(scores, facts)["metrics"]
    run.log(
        {f"{name}-{row}": row_values[row] for name, row_values in content.items() for row in ("median", "ci_l", "ci_h")}
    )
    run.finish()
