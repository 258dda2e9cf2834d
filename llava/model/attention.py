"""Attention over the flat batch, registered with transformers: each prefix tree of the row on its own.

Importing this module registers `constants.TREE_ATTENTION`. Calls without tree keywords (padded batches, generation)
behave exactly as transformers' own SDPA attention, so one setting serves training, evaluation and generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava.constants import TREE_ATTENTION


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
    tree_lengths: Sequence[int] | None = None,
    tree_masks: Sequence[Tensor | None] | None = None,
    tree_positions: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attend inside each tree of a row.

    Args:
        module: the attention layer.
        query: [1, Hq, T, D]; key, value: [1, Hk, T, D], Hk divides Hq.
        attention_mask: used only without tree keywords.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores; 1 / sqrt(D) when None.
        sliding_window: a token sees only tokens less than so many positions above it in its tree.
        tree_lengths: tokens of each tree.
        tree_masks: for each tree a [t, t] bool mask, or None for a chain.
        tree_positions: [T] depth of each token, needed with a sliding window.

    Returns:
        [1, T, Hq, D] and None (attention weights are not kept).
    """
    if tree_lengths is None or tree_masks is None:
        if sliding_window is not None:
            keywords["sliding_window"] = sliding_window
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
        return output, None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    start = 0
    for length, tree_mask in zip(tree_lengths, tree_masks, strict=True):
        part = slice(start, start + length)
        start += length
        mask = tree_mask
        if sliding_window is not None and tree_positions is not None:
            mask = windowed(mask, tree_positions[part], sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, part],
                key[:, :, part],
                value[:, :, part],
                attn_mask=mask,
                dropout_p=dropout,
                scale=scaling,
                is_causal=mask is None and length > 1,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def windowed(mask: Tensor | None, positions: Tensor, window: int) -> Tensor | None:
    """Narrow the mask of a tree ([t, t] bool, None: causal chain) to `window` positions; unchanged where all fit."""
    if int(positions.max()) < window:
        return mask
    near = positions[:, None] - positions[None, :] < window
    return (torch.ones_like(near).tril_() if mask is None else mask) & near


def use_tree_attention(model: PreTrainedModel) -> None:
    """Let the language model attend tree by tree; the vision tower keeps SDPA."""
    model.set_attn_implementation({"text_config": TREE_ATTENTION, "vision_config": "sdpa"})


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
