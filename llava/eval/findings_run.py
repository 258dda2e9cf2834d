"""Findings of chest X-rays for a question file, in chunks, and the join of the chunks.

    query file --loader--> samples --AnswerRun, one chunk--> predictions of the chunk
    test_0.jsonl, test_1.jsonl, ... --join_chunks: each index once--> one file in the order of the query file

Ids of LLaVA-Rad's annotation files repeat, so a prediction is known by its index in the rows that the loader keeps.
"""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.data.records import LOADERS, load_samples
from llava.errors import ConfigError, DataError, GenerationError
from llava.eval.inference import AnswerOptions, AnswerRun, AnswerSummary
from llava.eval.options import (
    FIRST_MODEL_HELP,
    MORE_MODEL_OPTIONS,
    add_model_options,
    connected_model,
    model_id_of,
    sampling_of,
    warn_no_effect,
)
from llava.eval.row_forms import FindingsRows
from llava.generation.fingerprint import differing_settings, join_settings, model_settings, read_settings
from llava.generation.options import engine_of
from llava.utils import log
from llava.utils.cli import Parser, check_folder
from llava.utils.files import exclusive_file
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_records

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
BATCH_SIZE = 8
"""Defaults of the published command."""

CHUNK_NAME = re.compile(r"test_(\d+)\.jsonl")
MAX_NAMED = 10
"""Number of indices that a message lists."""


def make_parser() -> Parser:
    """Return the parser of the published command, with its underscores or dashes."""
    parser = Parser(
        prog="model_mimic_cxr.py",
        description="Write the findings of chest X-rays, one row per image.",
        epilog="example: python -m llava.eval.model_mimic_cxr --model-path runs/rad --query-file test.json "
        "--image-folder images --prediction-file findings.jsonl",
    )
    add_model_options(parser)
    parser.add_switch("--load-8bit", help="the same as --bits 8")
    parser.add_switch("--load-4bit", help="the same as --bits 4")
    files = parser.add_argument_group("files")
    files.add_argument("--query-file", required=True, help="annotation file, or rows with image and conversations")
    files.add_argument("--loader", default="default", help=f"layout of the query file: {', '.join(LOADERS)}")
    files.add_argument("--image-folder", required=True, help="folder of the images")
    files.add_argument("--prediction-file", required=True, help="JSON lines, one row per image; resumed if unfinished")
    files.add_argument("--limit", type=int, help="use only the first N rows that the loader keeps")
    files.add_argument("--num-chunks", type=int, default=1, help="number of chunks that the rows are divided into")
    files.add_argument("--chunk-idx", type=int, default=0, help="index of the chunk to answer")
    files.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="images passed to the engine at once")
    parser.add_switch("--group-by-length", help="short prompts first; batches need no equal lengths here")
    parser.add_switch("--resume", default=True, help="keep the predictions that the file already holds")
    parser.add_switch("--blank-images", help="replace every image by a gray square")
    parser.show_first(
        {"files": ("--query-file", "--image-folder", "--prediction-file", "--loader", "--limit"), **FIRST_MODEL_HELP},
        MORE_MODEL_OPTIONS,
    )
    return parser


def read_queries(args: Namespace) -> list[Any]:
    """Return the samples of the query file.

    Raises:
        ConfigError: the loader is unknown, the image folder does not exist, or `--limit` is below 1.
        DataError: the file cannot be used.
    """
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    check_folder(args.image_folder, "--image-folder")
    return load_samples(args.query_file, loader=args.loader)[: args.limit]


def run_findings(args: Namespace) -> AnswerSummary:
    """Write the findings of one chunk; the model is loaded only if rows are pending.

    Raises:
        GenerationError: rows failed; the others are kept, and the same command resumes.
    """
    log.setup_logging()
    bits = 4 if args.load_4bit else 8 if args.load_8bit else args.bits
    args = connected_model(Namespace(**{**vars(args), "bits": bits}))
    warn_no_effect(args)
    samples = read_queries(args)
    asked = [replace(sample, meta={**sample.meta, "id": index}) for index, sample in enumerate(samples)]
    options = AnswerOptions(
        image_folder=args.image_folder,
        sampling=sampling_of(args, max_new_tokens=MAX_NEW_TOKENS),
        model_id=model_id_of(args),
        form="raw",
        by_length=args.group_by_length,
        blank_images=args.blank_images,
        settings={**model_settings(args), "loader": args.loader, "rows": len(samples)},
    )
    with exclusive_file(args.prediction_file, option="--prediction-file"):
        run = AnswerRun(
            asked,
            args.prediction_file,
            num_chunks=args.num_chunks,
            chunk_idx=args.chunk_idx,
            resume=args.resume,
            options=options,
            row_form=FindingsRows(samples),
        )
        engine = engine_of(args) if run.pending else None
        summary = run.finish(engine, batch_size=args.batch_size)
    _report(summary, options.sampling.max_new_tokens)
    return summary


def _report(summary: AnswerSummary, limit: int) -> None:
    """Log the counts of a run.

    Raises:
        GenerationError: rows failed.
    """
    num, written = summary.num_questions, summary.num_questions - summary.num_resumed
    logger.info("%d predictions (%d kept) in %.1f s", num, summary.num_resumed, summary.seconds)
    if summary.num_truncated:
        share = 100 * summary.num_truncated / max(1, written)
        logger.warning(
            "%d of %d new predictions (%.1f %%) were cut at --max-new-tokens %d",
            *(summary.num_truncated, written, share, limit),
        )
    if summary.num_failed:
        raise GenerationError(
            f"{summary.path}: {summary.num_failed} of {num} rows failed; field 'error' of each has the reason. Fix the "
            "errors and rerun the same command to resume"
        )


def check_chunks(folder: str | Path, num_chunks: int) -> list[Path]:
    """Return the chunk files of a division, which need not exist yet.

    Raises:
        ConfigError: `num_chunks` is below 1, or the folder holds chunk files of another division.
    """
    if num_chunks < 1:
        raise ConfigError(f"--num-chunks must be at least 1, got {num_chunks}")
    place = Path(folder)
    numbers = {path: int(match[1]) for path in place.glob("*") if (match := CHUNK_NAME.fullmatch(path.name))}
    for path, number in sorted(numbers.items()):
        before = read_settings(path).get("num chunks", num_chunks)
        if number >= num_chunks or before != num_chunks:
            division = f"chunk {number} of {before} chunks" if before != num_chunks else f"chunk {number}"
            raise ConfigError(
                f"{path} is {division} of an earlier run, but this one has {num_chunks}; resume with the earlier "
                "number, or delete the chunk files"
            )
    return [place / f"test_{number}.jsonl" for number in range(num_chunks)]


def join_chunks(folder: str | Path, num_chunks: int, out: str | Path) -> int:
    """Join the chunk files of a run in the order of its rows, and return their number.

    Raises:
        DataError: a chunk is missing, chunks have other settings or rows with errors, or an index occurs twice or
            not at all.
        ConfigError: see `check_chunks`.
    """
    parts = check_chunks(folder, num_chunks)
    rows: dict[int, dict[str, Any]] = {}
    first = _chunk_settings(parts[0])
    for part in parts:
        changed = [name for name in differing_settings(first, _chunk_settings(part)) if name != "questions"]
        if changed:
            raise DataError(f"{part} was written with other {', '.join(changed)} than {parts[0].name}")
        for number, row in enumerate(read_records(part) if part.stat().st_size else ()):
            index = row.get("index")
            if not isinstance(index, int) or index in rows or "error" in row:
                raise DataError(f"{part}, row {number}: {_problem(row, rows)}; rerun the chunk to resume")
            rows[index] = row
    expected = set(range(int(first.get("rows", len(rows)))))
    if missing := sorted(expected - rows.keys()):
        raise DataError(f"{folder}: no prediction for {_named(missing)} of {len(expected)}; rerun the chunks to resume")
    if extra := sorted(rows.keys() - expected):
        raise DataError(f"{folder}: predictions for {_named(extra)}, but the query file has {len(expected)} rows")
    write_records(out, [rows[index] for index in sorted(rows)])
    join_settings(out, parts)
    return len(rows)


def _chunk_settings(part: Path) -> dict[str, Any]:
    if not part.is_file():
        raise DataError(f"chunk file {part} is missing; rerun the chunk")
    return read_settings(part, of_empty=True)


def _problem(row: dict[str, Any], rows: dict[int, dict[str, Any]]) -> str:
    if "error" in row:
        return f"the row failed: {row['error']}"
    index = row.get("index")
    return f"index {index} occurs twice" if index in rows else f"expected field 'index', a number, got {index!r}"


def _named(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:MAX_NAMED])) + (", ..." if len(indices) > MAX_NAMED else "")
    return f"{len(indices)} rows (index {shown})"


def join_main(argv: Sequence[str] | None = None) -> None:
    """Check or join the chunk files of a folder, as `scripts/eval.sh` does."""
    parser = Parser(prog="findings_run", description="Join the chunks of predicted findings in the order of the rows.")
    parser.add_argument("--folder", required=True, help="folder of test_0.jsonl, test_1.jsonl ...")
    parser.add_argument("--num-chunks", type=int, required=True, help="number of chunks of the run")
    parser.add_argument("--out", help="joined file; without it, only check for chunks of another run")
    args = parser.parse_args(argv)
    log.setup_logging()
    if args.out is None:
        check_chunks(args.folder, args.num_chunks)
        return
    num_rows = join_chunks(args.folder, args.num_chunks, args.out)
    logger.info("%d predictions of %d chunks joined in %s", num_rows, args.num_chunks, args.out)
