"""Embedding rows that were trained with a projector, put where the vocabulary has their words.

mm_projector.bin, non_lora_trainables.bin: embed_tokens.weight [rows, D] --> the base's embeddings (and head) [words, D]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llava.constants import IM_END_TOKEN, IM_START_TOKEN
from llava.errors import CheckpointError
from llava.model.checkpoint.assemble import grow_head, mean_rows
from llava.model.checkpoint.formats import Layout
from llava.model.checkpoint.weight_names import EMBEDDINGS
from llava.tokenization import word_id


def marker_rows(tokenizer: Any) -> list[int]:
    """The ids of the two markers around an image, where the vocabulary has them both; else none."""
    rows = [word_id(tokenizer, word) for word in (IM_START_TOKEN, IM_END_TOKEN)]
    return [row for row in rows if row is not None] if None not in rows else []


def take_rows(state: dict[str, Tensor], rows: Tensor, layout: Layout, markers: Sequence[int]) -> None:
    """Put embedding rows that were trained with a projector into embeddings and head, under our names.

    A whole table replaces the base's. Two rows are those of the markers: they go where the vocabulary has these words,
    which is behind the base's rows, or among rows that a padded table keeps free.

    Args:
        state: the base's weights.
        rows: [k, D], as the file has them.
        layout: the checkpoint, for messages.
        markers: see `marker_rows`.

    Raises:
        CheckpointError: they fit neither as a whole table nor as the two markers' rows.
    """
    table = state[EMBEDDINGS]
    if rows.dim() != 2 or rows.shape[1] != table.shape[1]:
        raise CheckpointError(
            f"{layout.path}: embedding rows are {tuple(rows.shape)}, the base's {tuple(table.shape)}; "
            "give the base it was trained on with --model-base"
        )
    if rows.shape[0] >= table.shape[0]:
        state[EMBEDDINGS] = rows
        grow_head(state, rows.shape[0])
        return
    if rows.shape[0] != len(markers):
        raise CheckpointError(
            f"{layout.path}: {rows.shape[0]} embedding rows; expected the whole table of at least {table.shape[0]}, "
            f"or those of the {len(markers)} marker words that its vocabulary has"
        )
    num_missing = max(max(markers) + 1 - table.shape[0], 0)
    grown = mean_rows(table, num_missing) if num_missing else table.clone()
    grown[list(markers)] = rows.to(table.dtype)
    state[EMBEDDINGS] = grown
    grow_head(state, grown.shape[0])
