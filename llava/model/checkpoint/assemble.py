"""Weights that were gathered from files into a model: rows for new words, then all of them or none."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from llava.errors import CheckpointError
from llava.model.checkpoint.files.shards import TensorEntry, read_with_room
from llava.model.checkpoint.weight_names import EMBEDDINGS, HEAD, TOWER
from llava.model.config import LlavaMedConfig
from llava.model.foreign_options import ForeignOptions
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.towers import UNREADABLE, UNUSED_PARTS, first_line

logger = logging.getLogger(__name__)

VALUES_AT_A_TIME = 2**20
"""Of a table that is summed, as a float32 copy."""


def grow(state: dict[str, Tensor], num_words: int, files: Mapping[str, TensorEntry] | None = None) -> None:
    """Append embedding rows until every word has one: the mean of the rows before (specification 1.2); never shrink.

    Args:
        state: weights under our names.
        num_words: that need a row.
        files: the tensors in their files, where the state's tables are these as they are: they need not be copied.
    """
    missing = num_words - state[EMBEDDINGS].shape[0]
    if missing > 0:
        logger.info("embeddings: %d new rows for words without one, each the mean of the others", missing)
        state[EMBEDDINGS] = mean_rows(state[EMBEDDINGS], missing, _entry(files, "embed_tokens.weight"))
    grow_head(state, state[EMBEDDINGS].shape[0], files)


def grow_head(state: dict[str, Tensor], num_rows: int, files: Mapping[str, TensorEntry] | None = None) -> None:
    """Give the head as many rows as the embeddings have, likewise."""
    name = HEAD + "weight"
    if name in state and state[name].shape[0] < num_rows:
        logger.info("head: %d new rows, each the mean of the others", num_rows - state[name].shape[0])
        state[name] = mean_rows(state[name], num_rows - state[name].shape[0], _entry(files, name))


def _entry(files: Mapping[str, TensorEntry] | None, ending: str) -> TensorEntry | None:
    return next((entry for name, entry in (files or {}).items() if name.endswith(ending)), None)


def mean_rows(table: Tensor, num_new: int, entry: TensorEntry | None = None) -> Tensor:
    """A table with new rows behind it, each the mean of the old ones.

    Args:
        table: the old rows.
        num_new: rows to append.
        entry: where the table lies in a file, if it does.
    """
    num_old = len(table)
    whole = None
    if entry is not None and entry.shape == tuple(table.shape) and entry.dtype == str(table.dtype).split(".")[-1]:
        whole = read_with_room(entry, num_old + num_new)
    mean = _mean(table if whole is None else whole[:num_old])
    if whole is None:
        return torch.cat([table, mean.expand(num_new, -1)])
    whole[num_old:] = mean
    return whole


def _mean(table: Tensor) -> Tensor:
    """The mean of the rows, summed in float32; torch's own mean of a half-precision table takes ten times as long.

    In one room for all pieces, and by one thread: so little work is done before several have met, and on a busy
    machine they wait for each other far longer than the sums take.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        room = torch.empty(max(VALUES_AT_A_TIME // table.shape[1], 1), table.shape[1])
        total = torch.zeros(table.shape[1])
        for rows in table.split(len(room)):
            total += room[: len(rows)].copy_(rows).sum(dim=0)  # a product with ones is faster, but rounds as it likes
    finally:
        torch.set_num_threads(num_threads)
    return (total / len(table)).to(table.dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own table of missing weights stays unprinted: what counts of it becomes an error here."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def place(
    config: LlavaMedConfig, state: Mapping[str, Tensor], options: ForeignOptions, *, name: str
) -> LlavaMedForConditionalGeneration:
    """The model with the weights of `state`.

    On the CPU, and where the dtype stays, weights remain in the mapped files until they are touched, as with
    transformers' own loading; files may be replaced meanwhile (by renaming), not written into.

    Raises:
        CheckpointError: a weight is missing, unknown, or of another shape.
    """
    dtype = state[EMBEDDINGS].dtype if options.dtype == "auto" else options.dtype
    quantization = options.quantization.config(dtype)
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)  # of parts that no file holds and nobody reads (a pooler)
            model, report = cast(Any, LlavaMedForConditionalGeneration).from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                dtype=dtype,
                device_map=options.device_map,
                quantization_config=quantization,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise CheckpointError(f"{name} cannot be loaded: {first_line(error)}") from error
    check_report(report, name)
    return cast(LlavaMedForConditionalGeneration, model.train(False))


def check_report(report: Mapping[str, Any], name: str) -> None:
    """Make sure that every weight of the model was in the files, and the other way round, with the right shape.

    Args:
        report: what `from_pretrained` returns as `output_loading_info`, where it ignored mismatched sizes.
        name: of the checkpoint.

    Raises:
        CheckpointError: some were not; a part of the tower that nobody reads may be missing.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(" ".join(map(str, key)) if isinstance(key, tuple) else key for key in report.get(kind) or ())
        if wrong := [key for key in keys if not (key.startswith(TOWER) and any(part in key for part in UNUSED_PARTS))]:
            raise CheckpointError(f"{name}: weights do not fit the model: {len(wrong)} {kind} such as {wrong[0]}")
