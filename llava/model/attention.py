"""Attention over the flat batch, computed separately for each prefix tree of a row.

Importing this module registers `constants.TREE_ATTENTION`. Calls without a plan (padded batches, generation) behave
exactly as transformers' own SDPA attention, so one setting serves training, evaluation and generation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava.constants import TREE_ATTENTION
from llava.errors import ConfigError

SCORE_KEYWORDS = ("softcap", "s_aux", "position_bias")
"""Arguments by which transformers changes attention scores beyond scaling and masks; SDPA ignores them silently."""

HALF_PRECISION = (torch.bfloat16, torch.float16)

MATMUL_PAIRS = 1 << 18
"""Query-key pairs up to which `matmul_attention` may hold a piece's score matrix; larger pieces need SDPA's memory."""


FLEX_MIN_WIDTH = 16
"""Smallest width of a head that FlexAttention's kernels compute; they end in an error below it."""


class PlannedPiece(Protocol):
    """Run of tokens of a row, with the indices of the pieces above it in its tree."""

    @property
    def above(self) -> tuple[int, ...]: ...

    @property
    def num_above(self) -> int: ...

    @property
    def length(self) -> int: ...


class RowPlan(Protocol):
    """Layout of a row and its masks, as `data.attention_plan.AttentionPlan` gives them."""

    @property
    def lengths(self) -> list[int]: ...

    @property
    def pieces(self) -> Sequence[PlannedPiece]: ...

    def mask(self, index: int, window: int | None = None) -> Tensor | None: ...

    def bias(self, index: int, window: int | None, dtype: torch.dtype) -> Tensor: ...

    def block_mask(self, window: int | None = None) -> BlockMask: ...


class KeyValueSlots(Protocol):
    """Cached keys and values of sequences being generated, as `generation.kv_cache.SlotCache` holds them."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None
    ) -> Tensor: ...


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tree_plan: RowPlan | None = None,
    slots: KeyValueSlots | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attend inside each tree of a row.

    Args:
        module: the attention layer.
        query: [1, Hq, T, D]; key, value: [1, Hk, T, D], Hk divides Hq.
        attention_mask: used only without a plan.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores; 1 / sqrt(D) when None.
        sliding_window: a token sees only tokens less than this many positions above it in its tree.
        tree_plan: the pieces of the row and their masks.
        slots: given by a decoding step with one token per sequence: the cache that each token attends to.

    Returns:
        [1, T, Hq, D] and None (attention weights are not kept).

    Raises:
        ConfigError: the model changes its scores in a way that SDPA does not compute.
    """
    _refuse_unknown_scores(keywords)
    if slots is not None:
        layer = int(cast(Any, module).layer_idx)
        return slots.attend(layer, query, key, value, scaling=scaling, window=sliding_window), None
    if tree_plan is None:
        if sliding_window is not None:
            keywords["sliding_window"] = sliding_window
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
        return output, None
    if flex_computes(query.device.type, width=query.shape[-1], dropout=dropout):
        mask = tree_plan.block_mask(sliding_window)
        output = _compiled_flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None
    return attend_by_pieces(query, key, value, tree_plan, dropout=dropout, scaling=scaling, window=sliding_window), None


def attend_by_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: RowPlan,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend piece by piece; query [1, Hq, T, D], key and value [1, Hk, T, D], returns [1, T, Hq, D].

    SDPA is used, except for small pieces in half precision on a CPU: there its kernel is several times slower than
    plain matrix products (`matmul_attention`).
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # cast once instead of once per piece
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if kind == "cpu" and query.dtype in HALF_PRECISION and not dropout:
        largest = max(piece.length * (piece.num_above + piece.length) for piece in plan.pieces)
        if largest <= MATMUL_PAIRS:
            return attend_by_matmul(query, key, value, plan, scaling=scaling, window=window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # One split per tensor: its backward is one concatenation, where slices would each add a tensor of zeros.
    queries, keys, values = (tensor.split(plan.lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for index, piece in enumerate(plan.pieces):
        mask = plan.mask(index, window)
        members = (*piece.above, index)
        own = queries[index] if mask is not None else _joined(queries, members)
        output = F.scaled_dot_product_attention(
            own,
            _joined(keys, members),
            _joined(values, members),
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            is_causal=mask is None,
        )
        if mask is None:
            output = output[:, :, piece.num_above :]
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def attend_by_matmul(
    query: Tensor, key: Tensor, value: Tensor, plan: RowPlan, *, scaling: float | None = None, window: int | None = None
) -> Tensor:
    """Attend as `attend_by_pieces`, but with `matmul_attention`; keys are not repeated."""
    queries, keys, values = (tensor.split(plan.lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for index, piece in enumerate(plan.pieces):
        members = (*piece.above, index)
        bias = plan.bias(index, window, query.dtype)
        output = matmul_attention(queries[index], _joined(keys, members), _joined(values, members), bias, scaling)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def matmul_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float | None) -> Tensor:
    """Attention as two matrix products with a float32 softmax between them, as transformers' eager form.

    Args:
        query: [1, Hq, Tq, D].
        key: [1, Hk, Tk, D], Hk divides Hq: the queries of a group are stacked, so keys are never repeated.
        value: [1, Hk, Tk, D].
        bias: [Tq, Tk] added to the scores, -inf where a query does not see.
        scaling: factor of the scores; 1 / sqrt(D) when None.
    """
    _, num_heads, num_queries, width = query.shape
    num_key_heads = key.shape[1]
    groups = num_heads // num_key_heads
    stacked = query.reshape(num_key_heads, groups * num_queries, width)
    factor = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(bias.repeat(groups, 1), stacked, key[0].transpose(1, 2), alpha=factor)
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=precise).to(value.dtype)
    return torch.bmm(weights, value[0]).view(1, num_heads, num_queries, width)


def _joined(parts: Sequence[Tensor], members: Sequence[int]) -> Tensor:
    return parts[members[0]] if len(members) == 1 else torch.cat([parts[index] for index in members], dim=2)


def flex_computes(device_type: str, *, width: int, dropout: float) -> bool:
    """Return whether FlexAttention computes a row: on a GPU, without dropout, heads of at least 16 values."""
    return device_type == "cuda" and not dropout and width >= FLEX_MIN_WIDTH


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    """Compile FlexAttention once for rows of any length; uncompiled it would fill a [T, T] matrix."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=True))


def _refuse_unknown_scores(keywords: Mapping[str, Any]) -> None:
    for name in SCORE_KEYWORDS:
        if keywords.get(name) is not None:
            raise ConfigError(
                f"the language model's attention uses {name!r}, which {TREE_ATTENTION!r} does not compute; "
                "set its attention implementation to 'eager' and the layout to 'padded'"
            )


def supports_tree_attention(language_model: PreTrainedModel) -> bool:
    """Return whether SDPA computes the model's attention; others (soft caps, sinks, ALiBi) keep their own."""
    return bool(language_model._supports_sdpa)


def use_tree_attention(model: PreTrainedModel) -> None:
    """Set the language model to tree attention if it supports it; the vision tower keeps SDPA."""
    implementations = {"vision_config": "sdpa"}
    if supports_tree_attention(model.get_decoder()):
        implementations["text_config"] = TREE_ATTENTION
    model.set_attn_implementation(implementations)


def use_library_attention(model: PreTrainedModel, name: str) -> None:
    """Set the language model to an attention of transformers, for padded batches.

    Raises:
        ConfigError: the language model does not have it, or the machine cannot compute it.
    """
    try:
        model.set_attn_implementation({"text_config": name})
    except (ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"attention {name!r} cannot be used: {reason}") from error


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
