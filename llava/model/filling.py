"""Weights that were gathered from files into a model: rows for new words, then all of them or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from llava.errors import CheckpointError
from llava.model.config import LlavaMedConfig
from llava.model.foreign_options import ForeignOptions
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.towers import UNREADABLE, UNUSED_PARTS, first_line
from llava.model.names import EMBEDDINGS, HEAD, TOWER

ROWS_AT_A_TIME = 512


def grow(state: dict[str, Tensor], num_words: int) -> None:
    """Append embedding rows until every word has one: the mean of the rows before (specification 1.2); never shrink."""
    missing = num_words - state[EMBEDDINGS].shape[0]
    if missing > 0:
        state[EMBEDDINGS] = mean_rows(state[EMBEDDINGS], missing)
    grow_head(state, state[EMBEDDINGS].shape[0])


def grow_head(state: dict[str, Tensor], num_rows: int) -> None:
    """Give the head as many rows as the embeddings have, likewise."""
    name = HEAD + "weight"
    if name in state and state[name].shape[0] < num_rows:
        state[name] = mean_rows(state[name], num_rows - state[name].shape[0])


def mean_rows(table: Tensor, num_new: int) -> Tensor:
    """A table with new rows behind it, each the mean of the old ones.

    Summed in float32, some rows at a time: torch's own mean of a half-precision table takes ten times as long.
    """
    total = torch.zeros(table.shape[1])
    for rows in table.split(ROWS_AT_A_TIME):
        total += rows.float().sum(dim=0)
    mean = (total / len(table)).to(table.dtype)
    return torch.cat([table, mean.expand(num_new, -1)])


@contextmanager
def _quiet() -> Iterator[None]:
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
        with torch.random.fork_rng(devices=[]), _quiet():
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
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(" ".join(map(str, key)) if isinstance(key, tuple) else key for key in report.get(kind) or ())
        if wrong := [key for key in keys if not (key.startswith(TOWER) and any(part in key for part in UNUSED_PARTS))]:
            raise CheckpointError(f"{name}: weights do not fit the model: {len(wrong)} {kind} such as {wrong[0]}")
    return cast(LlavaMedForConditionalGeneration, model.train(False))
