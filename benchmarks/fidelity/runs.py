"""Checks of recorded training runs, repeated by our trainer, and of recorded scores of answer files."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.fidelity.folder import Line, Oracle, within
from benchmarks.fidelity.trajectories import LOSS_TOLERANCE, replay, runs
from llava.eval import run_eval, run_eval_batch
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.legacy.lora_files import read_lora

SCORE_TOLERANCE = 1e-5
"""Relative tolerance of scores; the recorded numbers have six digits."""

FEW = "5"
"""Number of resamples of confidence intervals, which are not compared."""


def trajectories(oracle: Oracle) -> Iterator[Line]:
    """Compare `train_log.json`: loss of every micro-batch and last weights of each run."""
    for run, reason in runs(oracle.path).items():
        if reason:
            yield Line(f"training {run}", None, "skipped", reason)
            continue
        with TemporaryDirectory() as scratch, _silence():
            normalization = "micro_batches" if "micro_batch_loss" in oracle.compat else "tokens"
            found = replay(oracle.path, run, Path(scratch), loss_normalization=normalization)
        note = f"{len(found.losses)} micro-batches, losses by {normalization}"
        yield within(f"training losses {run}", found.loss_difference, LOSS_TOLERANCE, note)
        # In units of the rounding bound of each weight over the steps of the run, see `weight_bounds`.
        # torch's maximum, because Python's skips NaN.
        worst, largest = (float(torch.tensor(list(values.values())).max()) for values in (found.shares, found.weights))
        note = f"{len(found.weights)} weights, share of each one's bound; largest difference {largest:.1e}"
        yield within(f"trained weights {run}", worst, 1.0, note)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the output and progress bars of a run."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def tower_adapter(oracle: Oracle) -> Iterator[Line]:
    """Compare `vit_lora_note.json`: largest trainable weight of the tower's adapter."""
    recorded, adapters = oracle.json("vit_lora_note.json"), []
    for folder in oracle.adapters:
        if inner := Checkpoint.open(folder).tower_adapter:
            adapters.append(read_lora(inner, tower=True))
    if len(adapters) != 1:
        raise LookupError(f"expected one adapter of a tower, found {len(adapters)}")
    [adapter] = adapters
    largest = max(float(adapter.reader.read(pair.up).abs().max()) for pair in adapter.pairs.values())
    note = f"{len(adapter.pairs)} layers, largest weight of their second matrices {largest:g}"
    yield within("adapter of the tower", abs(largest - recorded["max_abs_lora_B"]), 0, note)


def scores(oracle: Oracle) -> Iterator[Line]:
    """Compare `expected_metrics.json`: results of each scoring program for the answer file beside it."""
    answers = next(path for path in sorted(oracle.path.glob("*.jsonl")) if _answers_all(path, oracle))
    for name, figures in oracle.json("expected_metrics.json").items():
        if name in PROGRAMS:
            with TemporaryDirectory() as scratch:
                printed = PROGRAMS[name](oracle.path, answers, Path(scratch))
            # A missing row is NaN and fails.
            gaps = {row: abs(printed.get(row, float("nan")) / value - 1) for row, value in figures.items()}
            worst = max(gaps, key=lambda row: (gaps[row] != gaps[row], gaps[row]))
            yield within(f"scores {name}", gaps[worst], SCORE_TOLERANCE, f"{len(figures)} figures, relative")


def _answers_all(path: Path, oracle: Oracle) -> bool:
    rows = _rows(path)
    return {"question_id", "text"} <= set(rows[0]) and len(rows) == oracle.json("expected_metrics.json")["n"]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _figures(table: str) -> dict[str, float]:
    """Return the numbers of a printed table."""
    below = table.partition("-------------\n")[2].partition("\n\n")[0]
    lines = [line for line in below.splitlines() if not line.startswith("note: ")]
    return {name.strip(): float(value) for name, value in (line.rsplit(None, 1) for line in lines)}


def _run_eval(folder: Path, answers: Path, scratch: Path) -> dict[str, float]:
    argv = ["--gt", str(folder / "test.json"), "--candidate", str(folder / "candidate.json")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_eval.main([*argv, "--pred", str(answers), "--num-resamples", FEW, "--out", str(scratch / "out.json")])
    return _figures(printed.getvalue())


def _run_eval_batch(folder: Path, answers: Path, scratch: Path) -> dict[str, float]:
    (scratch / "runs" / "vqa_rad").mkdir(parents=True)
    shutil.copy(answers, scratch / "runs" / "vqa_rad" / "x-test-answer-file.jsonl")
    argv = ["--pred-file-parent-path", str(scratch / "runs"), "--target-test-type", "test-answer-file"]
    argv += ["--gt-root", str(folder.resolve()), "--num-resamples", FEW]  # resolved before the working folder changes
    with contextlib.chdir(scratch), contextlib.redirect_stdout(io.StringIO()):
        run_eval_batch.main(argv)
    [row] = _rows(scratch / "eval_results_med_datasets.jsonl")
    return _figures(row["results"])


PROGRAMS = {"run_eval": _run_eval, "batch": _run_eval_batch}
"""Programs that compute the numbers, by key of the file."""
