"""Checks of recorded training runs, repeated by our trainer, and of recorded scores of answer files."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.fidelity.folder import WEIGHTS, Line, Oracle, mismatches, within
from benchmarks.fidelity.grown_vocabulary import HEAD, INPUT
from benchmarks.fidelity.recorded_weights import FINAL_FILES, current_name
from benchmarks.fidelity.trajectories import (
    LOG_FILE,
    SELF_QUESTIONING,
    Replay,
    largest_gap,
    options_of,
    replay,
    tolerances_of,
)
from llava.eval import run_eval, run_eval_batch
from llava.model.checkpoint.formats import CONFIG_FILE, Checkpoint, read_json
from llava.model.checkpoint.legacy.lora_files import read_lora

SCORE_TOLERANCE = 1e-5
"""Relative tolerance of scores; the recorded numbers have six digits."""

RATE_TOLERANCE = 1e-12
"""Tolerance of a learning rate of about 1e-3, computed in float64."""

FEW = "5"
"""Number of resamples of confidence intervals, which are not compared."""


def trajectories(oracle: Oracle) -> Iterator[Line]:
    """Compare `train_log.json`: loss of every micro-batch, last weights and the other entries of each run."""
    for run, log in sorted(oracle.json(LOG_FILE).items()):
        options = options_of(log["argv"])
        if lacking := lacking_files(oracle, run, options):
            yield Line(f"training {run}", None, "skipped", lacking, lacks_weights=True)
            continue
        names = oracle.compat & {"micro_batch_loss", "shifted_images", *SELF_QUESTIONING.split(",")}
        found = replayed(oracle.path, run, frozenset(names))
        note = f"{len(found.losses)} micro-batches, losses by {_normalization(names)}"
        gap = largest_gap(found.losses, log["micro_losses"])
        yield within(f"training losses {run}", gap, tolerances_of(run)[0], note, count=len(found.losses))
        yield trained_weights(oracle, run, found)
        yield _settings(oracle, run, found)


def _normalization(names: frozenset[str]) -> str:
    return "micro_batches" if "micro_batch_loss" in names else "tokens"


@cache
def replayed(folder: Path, run: str, names: frozenset[str]) -> Replay:
    """Return the replay of a run with some defects of the originals."""
    with TemporaryDirectory() as scratch, _silence():
        return replay(
            folder,
            run,
            Path(scratch),
            loss_normalization=_normalization(names),
            shifts_images="shifted_images" in names,
            compat=",".join(sorted(names.intersection(SELF_QUESTIONING.split(",")))) or "none",
        )


def lacking_files(oracle: Oracle, run: str, options: dict[str, str]) -> str:
    """Return which recorded weights of a run the folder lacks; empty if none."""
    needed = {options["model_name_or_path"]: WEIGHTS, options["output_dir"]: FINAL_FILES, "init": (f"{run}.bin",)}
    if name := options.get("vision_tower_checkpoint"):
        needed[str(Path(name).parent)] = (Path(name).name,)
    else:
        needed[options["vision_tower"]] = WEIGHTS
    lacking = [
        f"{place} holds no weights (expected {' or '.join(files[:2])})"
        for place, files in needed.items()
        if not any(oracle.has(f"{place}/{file}") for file in files)
    ]
    return "; ".join(lacking)


def trained_weights(oracle: Oracle, run: str, found: Replay) -> Line:
    """Compare the last weights of a run, in units of the rounding bound of each one, see `weight_bounds`."""
    log = oracle.json(LOG_FILE)[run]
    final = oracle.path / options_of(log["argv"])["output_dir"]
    quantity, trained = f"trained weights {run}", found.trained.keys()
    lacking = {current_name(name) for name in log["trainable"]} - {current_name(name) for name in found.shares}
    if lacking & trained:
        files = ", ".join(file for file in FINAL_FILES if not (final / file).is_file())
        note = f"{final.name} lacks {len(lacking)} weights, perhaps of {files}"
        return Line(quantity, None, "skipped", note, lacks_weights=True)
    # torch's maximum, because Python's skips NaN.
    worst, largest = (float(torch.tensor(list(values.values())).max()) for values in (found.shares, found.weights))
    note = f"{len(found.weights)} weights, share of each one's bound; largest difference {largest:.1e}"
    return within(quantity, worst, tolerances_of(run)[1], note, count=len(found.weights))


def _settings(oracle: Oracle, run: str, found: Replay) -> Line:
    """Compare the other entries of a log: names, rates and groups of parameters, ids, order, vocabulary."""
    log = oracle.json(LOG_FILE)[run]
    names = {current_name(name) for name in log["trainable"]}
    accumulation = int(options_of(log["argv"]).get("gradient_accumulation_steps", 1))
    checks = {
        "trainable": names == found.trained.keys() and len(names) == len(log["trainable"]),
        "order": _is_order(log["order"], accumulation * len(found.log.rates), found),
    }
    if "warnings" in log:
        checks["warnings"] = log["warnings"] == 0  # a row that is ignored with a warning changes a loss
    if "lr" in log:
        ours = [rate for pair in found.log.rates for _ in range(accumulation) for rate in pair]
        theirs = [float(rate) for rates in log["lr"] for rate in (np.min(rates), np.max(rates))]  # keep NaN
        checks["lr"] = len(ours) == len(theirs) and largest_gap(ours, theirs) <= RATE_TOLERANCE
    if "vocab" in log:
        table = found.trained.get(current_name(INPUT), found.trained.get(current_name(HEAD)))
        saved = read_json(oracle.path / options_of(log["argv"])["output_dir"] / CONFIG_FILE).get("vocab_size")
        is_ours = table is not None and len(table) - log["vocab"] in (0, 1)  # one is our placeholder
        checks["vocab"] = is_ours and log["vocab"] == saved
    if "optimizer_groups" in log:
        # The original lists weights that it never moves, since they get no gradient.
        moved = [group for group in log["optimizer_groups"] if not any("vision_tower." in n for n in group["names"])]
        frozen = "frozen_vit_lora" in oracle.compat
        whole = all({"lr", "weight_decay"} <= group.keys() for group in log["optimizer_groups"])
        checks["optimizer_groups"] = whole and _are_groups(
            moved if frozen else log["optimizer_groups"], found.log.groups
        )
    if any(log.get("first_input_ids", ())):  # null where the model was called with embeddings
        theirs_first = [ids for batch in log["first_input_ids"] for ids in batch or ()]
        ours_first = found.log.ids[: len(theirs_first)]
        pairs = zip(theirs_first, ours_first, strict=False)
        checks["first_input_ids"] = bool(theirs_first) and all(
            ids[: len(mine)] == mine and len(set(ids[len(mine) :])) <= 1 for ids, mine in pairs
        )
    wrong = [name for name, is_right in checks.items() if not is_right]
    num_lists = sum(len(log.get(name, ())) for name in ("optimizer_groups", "first_input_ids"))
    return mismatches(f"training log {run}", wrong, f"{len(checks)} entries", count=len(checks) + num_lists)


def _is_order(order: Sequence[int], num_micro: int, found: Replay) -> bool:
    """Return whether the recorded rows are those of whole epochs, each row once, as many as were trained."""
    num_rows = max(order, default=-1) + 1
    epochs = [order[start : start + num_rows] for start in range(0, len(order), max(1, num_rows))]
    is_once = all(len(set(epoch)) == len(epoch) and min(epoch) >= 0 for epoch in epochs)
    return is_once and num_micro == len(found.losses) and len(order) >= len(found.log.ids)


def _are_groups(theirs: Sequence[dict[str, Any]], ours: dict[str, tuple[float, float]]) -> bool:
    """Return whether parameter groups have our rates and decays, as many parameters, and names of ours."""
    counts: Counter[tuple[float, float]] = Counter()
    for group in theirs:
        values = float(group["lr"]), float(group["weight_decay"])
        counts[values] += group["n"]
        if any(ours.get(current_name(name)) != values for name in group["names"]):
            return False
    return +counts == Counter(ours.values())


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the output and progress bars of a run."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def tower_adapter(oracle: Oracle) -> Iterator[Line]:
    """Compare `vit_lora_note.json`: largest trainable weight of the tower's adapter."""
    recorded, adapters = oracle.json("vit_lora_note.json"), []
    for folder in oracle.adapters:
        if inner := Checkpoint.open(folder).tower:
            adapters.append(read_lora(inner, tower=True))
    if len(adapters) != 1:
        raise LookupError(f"expected one adapter of a tower, found {len(adapters)}")
    [adapter] = adapters
    largest = max(float(adapter.reader.read(pair.up).abs().max()) for pair in adapter.pairs.values())
    num = 2 * len(adapter.pairs)
    note = f"{len(adapter.pairs)} layers, largest weight of their second matrices {largest:g}"
    difference = abs(largest - recorded["max_abs_lora_B"]) if recorded.get("n", num) == num else float("nan")
    # The floor of a known folder is that of `n`, so a removed `n` is noticed.
    yield within("adapter of the tower", difference, 0, note, count=num if "n" in recorded else 1)


def scores(oracle: Oracle) -> Iterator[Line]:
    """Compare `expected_metrics.json`: results of each scoring program for the answer file beside it."""
    recorded = oracle.json("expected_metrics.json")
    answers = next((path for path in sorted(oracle.path.glob("*.jsonl")) if _are_answers(path)), None)
    if answers is None:
        raise LookupError("no answer file, with question_id and text, is beside expected_metrics.json")
    numbers = _numbers(oracle, answers)
    wrong = [name for name, number in numbers.items() if recorded.get(name) != number]
    yield mismatches("numbers of answers", wrong, f"{len(numbers)} numbers", count=len(numbers))
    for name, figures in recorded.items():
        if name in numbers:
            continue
        if name not in PROGRAMS:
            raise LookupError(f"{name} is no scoring program; known: {', '.join(PROGRAMS)}")
        printed = _printed(name, oracle.path, answers)
        # A missing row is NaN and fails.
        gaps = {row: abs(printed.get(row, float("nan")) / value - 1) for row, value in figures.items()}
        worst = max(gaps, key=lambda row: (gaps[row] != gaps[row], gaps[row]))
        yield within(
            f"scores {name}", gaps[worst], SCORE_TOLERANCE, f"{len(figures)} figures, relative", count=len(figures)
        )


@cache
def _printed(name: str, folder: Path, answers: Path) -> dict[str, float]:
    with TemporaryDirectory() as scratch:
        return PROGRAMS[name](folder, answers, Path(scratch))


def _numbers(oracle: Oracle, answers: Path) -> dict[str, int]:
    """Return the numbers of answers, in total and by type of their question."""
    types = Counter(str(row.get("answer_type", "")).strip().upper() for row in oracle.json("test.json"))
    return {"n": len(_rows(answers)), "n_open": types["OPEN"], "n_closed": types["CLOSED"]}


def _are_answers(path: Path) -> bool:
    rows = _rows(path)
    return bool(rows) and {"question_id", "text"} <= set(rows[0]) and "answer_id" in rows[0]


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
