"""Attention over the flat batch, registered with transformers: each prefix tree of the row on its own.

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
"""What transformers hands to attention functions beside scaling and masks: SDPA would leave it out without a word."""


class Piece(Protocol):
    """A run of the row and the numbers of the pieces above it."""

    @property
    def above(self) -> tuple[int, ...]: ...

    @property
    def num_above(self) -> int: ...


class Plan(Protocol):
    """What the batch says about its row; `data.attention_plan.AttentionPlan` is one."""

    @property
    def lengths(self) -> list[int]: ...

    @property
    def pieces(self) -> Sequence[Piece]: ...

    def mask(self, index: int, window: int | None = None) -> Tensor | None: ...

    def block_mask(self, window: int | None = None) -> BlockMask: ...


class Slots(Protocol):
    """What generation knows about the past of its sequences; `generation.kv_slots.SlotCache` is one."""

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
    tree_plan: Plan | None = None,
    slots: Slots | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attend inside each tree of a row.

    Args:
        module: the attention layer.
        query: [1, Hq, T, D]; key, value: [1, Hk, T, D], Hk divides Hq.
        attention_mask: used only without a plan.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores; 1 / sqrt(D) when None.
        sliding_window: a token sees only tokens less than so many positions above it in its tree.
        tree_plan: the pieces of the row and their masks.
        slots: given by a decoding step, one token a sequence: the past that each token looks at.

    Returns:
        [1, T, Hq, D] and None (attention weights are not kept).

    Raises:
        ConfigError: the model changes its scores in a way that SDPA does not know.
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
    if query.is_cuda and not dropout:
        mask = tree_plan.block_mask(sliding_window)
        output = _compiled_flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return by_pieces(query, key, value, tree_plan, dropout=dropout, scaling=scaling, window=sliding_window), None


def by_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Run SDPA on each piece of the row; [1, H, T, D] each, returns [1, T, H, D]."""
    # One split a tensor: its backward is one concatenation, where slices would each add a row of zeros.
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


def _joined(parts: Sequence[Tensor], members: Sequence[int]) -> Tensor:
    return parts[members[0]] if len(members) == 1 else torch.cat([parts[index] for index in members], dim=2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention compiled once for rows of any length; without compilation it would fill a [T, T] matrix."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=True))


def _refuse_unknown_scores(keywords: Mapping[str, Any]) -> None:
    for name in SCORE_KEYWORDS:
        if keywords.get(name) is not None:
            raise ConfigError(
                f"the language model's attention uses {name!r}, which {TREE_ATTENTION!r} does not compute; "
                "set its attention implementation to 'eager' and the layout to 'padded'"
            )


def supports_tree_attention(language_model: PreTrainedModel) -> bool:
    """Whether the model's attention is what SDPA computes; others (soft caps, sinks, ALiBi) must keep their own."""
    return bool(language_model._supports_sdpa)


def use_tree_attention(model: PreTrainedModel) -> None:
    """Let the language model attend tree by tree if it can; the vision tower keeps SDPA."""
    implementations = {"vision_config": "sdpa"}
    if supports_tree_attention(model.get_decoder()):
        implementations["text_config"] = TREE_ATTENTION
    model.set_attn_implementation(implementations)


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
