"""Reference log-probabilities, computed once in a pass over the pairs, stored and read back.

    pairs --rows not in reference-*.jsonl, shared by the ranks--> reference-RANK.jsonl --> values by sequence key

A line holds `key` (`sequence_key`), `logprob`, and `weights` and `precision` of the model that gave it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from llava.data.collator import Collator
from llava.data.dataset import RowDataset
from llava.data.encode import Unit, as_unit
from llava.data.feature_cache import weights_hash
from llava.data.preference import PreferenceDataset, sequence_key
from llava.errors import DataError, LlavaError
from llava.train.ranks import checked_together
from llava.train.reference import sequence_logprobs
from llava.train.validation import dropout_off
from llava.utils.json_rows import read_records
from llava.utils.jsonl import append_record, drop_incomplete_line
from llava.utils.log import with_progress

logger = logging.getLogger(__name__)

RANK_FILE = "reference-{}.jsonl"
"""File of a rank in the output folder."""

NUMBER = "number"
"""Number of a sequence in its batch, which rows of the layout carry."""


@dataclass(frozen=True, slots=True)
class ReferenceScorer:
    """Model that gives the log-probabilities.

    Attributes:
        weights: hash of its weights.
        precision: `float32`, `bfloat16` or `float16`: data type of its products.
        device: device that it runs on.
    """

    weights: str
    precision: str
    device: torch.device

    @classmethod
    def of(cls, network: nn.Module, *, precision: str, device: torch.device) -> ReferenceScorer:
        """Return the scorer of a network that has not been trained yet."""
        return cls(start_hash(network), precision, device)


def start_hash(network: nn.Module) -> str:
    """Return a hash of a network's weights; an adapter that has not been trained counts as absent."""
    weights = network.state_dict()
    is_new = not any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B." in name)
    kept = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in weights.items()
        if isinstance(tensor, torch.Tensor) and not (is_new and "lora_" in name)
    }
    return weights_hash(kept, {})


@torch.no_grad()
def score_units(
    network: nn.Module, collator: Collator, units: Sequence[Unit], scorer: ReferenceScorer
) -> Iterator[dict[str, Any]]:
    """Yield the line of each sequence of some units, which are computed together.

    Raises:
        LlavaError: a log-probability is not finite.
    """
    numbers = iter(range(sum(map(len, units))))
    units = [tuple(replace(s, numbers={NUMBER: float(next(numbers))}) for s in unit) for unit in units]
    sequences = [sequence for unit in units for sequence in unit]
    laid_out = collator.rows(units, collator.dataset.images_for(sequences), collator.max_tokens_per_row)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(scorer.precision)
    for batch in (row.to(scorer.device) for row in laid_out):
        with dropout_off(network), torch.autocast(scorer.device.type, dtype=dtype, enabled=dtype is not None):
            values = sequence_logprobs(network, batch)
        for number, value in zip(batch.sequence_values[NUMBER].tolist(), values.tolist(), strict=True):
            key = sequence_key(sequences[int(number)])
            if not math.isfinite(value):
                raise LlavaError(
                    f"the log-probability of sequence {key} under the reference is {value}; expected a finite number. "
                    "Check the weights of the model (`llava checkpoint doctor`)"
                )
            yield reference_line(key, value, scorer)


def reference_line(key: str, logprob: float, scorer: ReferenceScorer) -> dict[str, Any]:
    """Return the line of a sequence."""
    return {"key": key, "logprob": logprob, "weights": scorer.weights, "precision": scorer.precision}


def cached_logprobs(
    network: nn.Module,
    collator: Collator,
    scorer: ReferenceScorer,
    *,
    folder: Path,
    batch_size: int,
    epochs: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """Return the log-probability of every sequence of the data by key; computes what the folder lacks.

    Every rank computes a share and appends it to its own file, so that a pass that was killed continues.

    Args:
        network: the policy as it starts.
        collator: collator of the pairs.
        scorer: the network's weights, precision and device.
        folder: output folder of the run.
        batch_size: data rows per batch.
        epochs: epochs of the run, in which damaged images may differ.
        rank: rank of this process.
        world_size: number of processes.

    Raises:
        LlavaError: a value is not finite, or a file of the folder cannot be read.
    """
    path = folder / RANK_FILE.format(rank)
    drop_incomplete_line(path)
    files = sorted(folder.glob(RANK_FILE.format("*")))
    known = _joined({key: value for file in files for key, value in read_lines(file, scorer).items()}, world_size)
    missing = _missing(collator, known, epochs)
    missing.sort(key=lambda place: collator.dataset.samples[place[0]].images)  # pairs about one image share its tokens
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    if batches:
        logger.info("log-probabilities under the reference: %d pairs in %d batches", len(missing), len(batches))
    found: dict[str, float] = {}

    def run() -> None:
        for places in with_progress(batches[rank::world_size], title="reference", unit="batch"):
            units = [_wanted(unit_of(collator, row, epoch), keys) for row, epoch, keys in places]
            for line in score_units(network, collator, units, scorer):
                append_record(path, line)
                found[line["key"]] = line["logprob"]

    checked_together(run, here=True)
    return _joined(known | found, world_size)


def unit_of(collator: Collator, row: int, epoch: int) -> Unit:
    """Return the unit of a data row in an epoch."""
    return as_unit(cast(RowDataset[Unit], collator.dataset).in_epoch(row, epoch))


def unit_places(collator: Collator, epochs: int) -> Iterator[tuple[int, int]]:
    """Yield row and epoch of every unit of a run, each once."""
    variants = cast(PreferenceDataset, collator.dataset).num_variants(epochs)
    return ((row, epoch) for epoch in range(variants) for row in range(len(collator.dataset)))


def _missing(collator: Collator, known: Mapping[str, float], epochs: int) -> list[tuple[int, int, frozenset[str]]]:
    """Return row, epoch and unknown keys of the units that have any; a shared key is listed once."""
    found: list[tuple[int, int, frozenset[str]]] = []
    seen = set(known)
    for row, epoch in unit_places(collator, epochs):
        if keys := {sequence_key(sequence) for sequence in unit_of(collator, row, epoch)} - seen:
            found.append((row, epoch, frozenset(keys)))
            seen |= keys
    return found


def _wanted(unit: Unit, keys: frozenset[str]) -> Unit:
    """Return the sequences of a unit that have one of these keys, one for each key."""
    by_key = {sequence_key(sequence): sequence for sequence in unit}
    return tuple(sequence for key, sequence in by_key.items() if key in keys)


def _joined(values: dict[str, float], world_size: int) -> dict[str, float]:
    """Return the values of all ranks; where two differ, those of the first rank."""
    if world_size == 1:
        return values
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, values)
    return {key: value for part in reversed(parts) for key, value in part.items()}


def read_lines(path: Path, scorer: ReferenceScorer | None = None) -> dict[str, float]:
    """Return the values of a file by key; with a scorer, those that it gave.

    Raises:
        DataError: a line is unusable, or the values are of several models and `scorer` is None.
    """
    values: dict[str, float] = {}
    origins: set[tuple[str, str]] = set()
    for number, line in enumerate(read_records(path), start=1):
        key, value = line.get("key"), cast(float, line.get("logprob"))
        origin = (str(line.get("weights")), str(line.get("precision")))
        if not isinstance(key, str) or type(value) not in (int, float) or not math.isfinite(value):
            raise DataError(
                f"{path}, line {number}: expected a text 'key' and a finite number 'logprob'; write the file with "
                "`llava preferences score`"
            )
        if scorer is None or origin == (scorer.weights, scorer.precision):
            values[key] = float(value)
            origins.add(origin)
    if len(origins) > 1:
        raise DataError(f"{path}: log-probabilities of {len(origins)} models or precisions; expected those of one")
    return values


def check_complete(values: Mapping[str, float], collator: Collator, path: str, *, epochs: int = 1) -> None:
    """Check that every sequence of the data has a value.

    Raises:
        DataError: one has none; the message names the first row.
    """
    for row, epoch in unit_places(collator, epochs):
        if any(sequence_key(sequence) not in values for sequence in unit_of(collator, row, epoch)):
            sample = collator.dataset.samples[row]
            where = f"id {sample.id!r}" if sample.origin is None else str(sample.origin)
            raise DataError(
                f"{where}: {path} holds no log-probability of it; write the file with `llava preferences score` for "
                "the same pairs, images, template, epochs and --model-max-length"
            )
