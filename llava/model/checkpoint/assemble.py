"""Put weights gathered from files into a model: add rows for new tokens, require a complete match."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from llava.constants import IM_END_TOKEN, IM_START_TOKEN
from llava.errors import CheckpointError
from llava.model.checkpoint.files.shards import TensorEntry, read_with_room
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.weight_names import EMBEDDINGS, HEAD, TOWER
from llava.model.config import LlavaMedConfig
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.towers import UNREADABLE, UNUSED_PARTS, first_line
from llava.model.quantization import Quantization
from llava.tokenization import token_id


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Parts and settings for loading a checkpoint of another format.

    Attributes:
        base: language model that an adapter or a projector builds on; also a tokenizer for a folder without one.
        vision_tower: folder or hub name, instead of the one that the checkpoint names.
        vision_tower_config: open_clip model configuration, instead of the one that the checkpoint names.
        vision_tower_checkpoint: open_clip weights, instead of those that the checkpoint names.
        tower_adapter: a tower's LoRA adapter (STLLaVA-Med's `Vit-lora`); one inside the folder is found.
        template: conversation template, instead of the one that the content suggests.
        dtype: dtype of the weights; "auto" keeps that of the embeddings.
        device_map: passed to transformers; None loads on the CPU.
        quantization: quantization of the language model.
        merge: add adapters to the weights (never to quantized ones).
    """

    base: str | None = None
    vision_tower: str | None = None
    vision_tower_config: str | None = None
    vision_tower_checkpoint: str | None = None
    tower_adapter: str | None = None
    template: str | None = None
    dtype: torch.dtype | Literal["auto"] = "auto"
    device_map: Any = None
    quantization: Quantization = field(default_factory=Quantization)
    merge: bool = True

    @property
    def parts(self) -> dict[str, str]:
        """The options that name parts, for loading the same model again."""
        names = ("base", "vision_tower", "vision_tower_config", "vision_tower_checkpoint", "tower_adapter", "template")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


logger = logging.getLogger(__name__)

VALUES_AT_A_TIME = 2**20
"""Number of values that are summed at once, as a float32 copy."""


def grow_tables(state: dict[str, Tensor], num_words: int, files: Mapping[str, TensorEntry] | None = None) -> None:
    """Append embedding rows until every token has one, each the mean of the old rows; never remove rows.

    Args:
        state: weights under our names.
        num_words: number of tokens that need a row.
        files: entries of the tensors, if the state's tables are unchanged from the files; saves copying them.
    """
    missing = num_words - state[EMBEDDINGS].shape[0]
    if missing > 0:
        logger.info("embeddings: %d new rows for tokens without one, each the mean of the others", missing)
        state[EMBEDDINGS] = mean_rows(state[EMBEDDINGS], missing, _entry(files, "embed_tokens.weight"))
    grow_head(state, state[EMBEDDINGS].shape[0], files)


def grow_head(state: dict[str, Tensor], num_rows: int, files: Mapping[str, TensorEntry] | None = None) -> None:
    """Append rows to the head until it has `num_rows`, each the mean of the old rows."""
    name = HEAD + "weight"
    if name in state and state[name].shape[0] < num_rows:
        logger.info("head: %d new rows, each the mean of the others", num_rows - state[name].shape[0])
        state[name] = mean_rows(state[name], num_rows - state[name].shape[0], _entry(files, name))


def _entry(files: Mapping[str, TensorEntry] | None, ending: str) -> TensorEntry | None:
    return next((entry for name, entry in (files or {}).items() if name.endswith(ending)), None)


def mean_rows(table: Tensor, num_new: int, entry: TensorEntry | None = None) -> Tensor:
    """Append rows to a table, each the mean of the old ones.

    Args:
        table: the old rows.
        num_new: rows to append.
        entry: the table's entry, if it is unchanged from a file.
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
    """Return the mean of the rows, summed in float32."""
    # torch's own mean of a half-precision table takes ten times as long.
    # One buffer for all pieces, and one thread: a piece is little work, and on a busy machine threads wait for
    # each other far longer than the sums take.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        room = torch.empty(max(VALUES_AT_A_TIME // table.shape[1], 1), table.shape[1])
        total = torch.zeros(table.shape[1])
        for rows in table.split(len(room)):
            # A product with ones is faster, but its rounding depends on the library.
            total += room[: len(rows)].copy_(rows).sum(dim=0)
    finally:
        torch.set_num_threads(num_threads)
    return (total / len(table)).to(table.dtype)


SPARE_WEIGHTS = 100_000_000
"""Weights that a configuration may describe beyond four times those in the files, before the two are compared."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' table of missing weights; what matters of it is raised as an error here."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def check_room(config: LlavaMedConfig, num_stored: int, name: str) -> None:
    """Check that a model is not far larger than its files, before memory is taken for it.

    Args:
        config: its configuration.
        num_stored: elements of all tensors in the files.
        name: name of the checkpoint, for messages.

    Raises:
        CheckpointError: the configuration describes far more weights.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = LlavaMedForConditionalGeneration(copy.deepcopy(config))
    needed = sum(weight.numel() for weight in model.parameters())
    if needed > 4 * num_stored + SPARE_WEIGHTS:
        raise CheckpointError(
            f"{name} does not fit its configuration, which describes {needed:,} weights; the files hold {num_stored:,}"
        )


def model_from_state(
    config: LlavaMedConfig, state: Mapping[str, Tensor], options: LoadOptions, *, name: str
) -> LlavaMedForConditionalGeneration:
    """Return the model with the weights of `state`.

    On the CPU, weights whose dtype does not change stay memory-mapped until they are used, as with transformers' own
    loading: meanwhile the files may be replaced (by renaming), but not overwritten.

    Raises:
        CheckpointError: a weight is missing, unknown, or of another shape.
    """
    dtype = state[EMBEDDINGS].dtype if options.dtype == "auto" else options.dtype
    quantization = options.quantization.config(dtype)
    try:
        check_room(config, sum(tensor.numel() for tensor in state.values()), name)
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(0)  # for parts that no file holds and nothing reads (a pooler)
            model, report = cast(Any, LlavaMedForConditionalGeneration).from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                dtype=dtype,
                device_map=options.device_map,
                quantization_config=quantization,
                ignore_mismatched_sizes=True,  # they are rejected below, by name
                output_loading_info=True,
            )
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"{name} cannot be loaded: {first_line(error)}") from error
    check_report(report, name)
    return cast(LlavaMedForConditionalGeneration, model.train(False))


def check_report(report: Mapping[str, Any], name: str) -> None:
    """Check that the files hold every weight of the model and no others, with the right shapes.

    Args:
        report: what `from_pretrained` returns as `output_loading_info`, where it ignored mismatched sizes.
        name: name of the checkpoint, for messages.

    Raises:
        CheckpointError: they do not; an unused part of the tower may be missing.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(" ".join(map(str, key)) if isinstance(key, tuple) else key for key in report.get(kind) or ())
        if wrong := [key for key in keys if not (key.startswith(TOWER) and any(part in key for part in UNUSED_PARTS))]:
            raise CheckpointError(f"{name}: weights do not fit the model: {len(wrong)} {kind} such as {wrong[0]}")


def marker_rows(tokenizer: Any) -> list[int]:
    """Return the ids of the two markers around an image if the vocabulary has both, else an empty list."""
    rows = [token_id(tokenizer, word) for word in (IM_START_TOKEN, IM_END_TOKEN)]
    return [row for row in rows if row is not None] if None not in rows else []


def take_rows(state: dict[str, Tensor], rows: Tensor, checkpoint: Checkpoint, markers: Sequence[int]) -> None:
    """Put embedding rows that were trained with a projector into embeddings and head, under our names.

    A whole table replaces the base's. Two rows are those of the markers: they are written where the vocabulary has
    these tokens, which is after the base's rows, or among unused rows of a padded table.

    Args:
        state: the base's weights.
        rows: [k, D], as the file has them.
        checkpoint: the checkpoint, for messages.
        markers: see `marker_rows`.

    Raises:
        CheckpointError: they fit neither as a whole table nor as the two markers' rows.
    """
    table = state[EMBEDDINGS]
    if rows.dim() != 2 or rows.shape[1] != table.shape[1]:
        raise CheckpointError(
            f"{checkpoint.path}: embedding rows are {tuple(rows.shape)}, the base's {tuple(table.shape)}; "
            "give the base it was trained on with --model-base"
        )
    if rows.shape[0] >= table.shape[0]:
        state[EMBEDDINGS] = rows
        grow_head(state, rows.shape[0])
        return
    if rows.shape[0] != len(markers):
        raise CheckpointError(
            f"{checkpoint.path}: {rows.shape[0]} embedding rows; expected the whole table of at least "
            f"{table.shape[0]}, or those of the {len(markers)} marker tokens that its vocabulary has"
        )
    num_missing = max(max(markers) + 1 - table.shape[0], 0)
    grown = mean_rows(table, num_missing) if num_missing else table.clone()
    grown[list(markers)] = rows.to(table.dtype)
    state[EMBEDDINGS] = grown
    grow_head(state, grown.shape[0])
