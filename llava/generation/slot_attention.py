"""Attention of a decoding step over stems and slots: one new token for each sequence.

queries [B * Hk, R, D] --on the stems, which are read once for all their sequences-->
                       --on the slots, in chunks of similar length--> softmax over both --> [B * Hk, R, D]
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.generation.kv_buffers import LayerBuffers
from llava.generation.step_index import StepIndex, of_heads


def attend(
    index: StepIndex, stems: LayerBuffers, slots: LayerBuffers, layer: int, queries: Tensor, *, window: int | None
) -> Tensor:
    """Attend to stem and slot of each sequence; the slots hold the new tokens already.

    Args:
        index: places of the step.
        stems: keys and values of shared parts.
        slots: keys and values of the rest.
        layer: number of the layer.
        queries: [B * Hk, R, D], scaled; R query heads share a key head.
        window: only tokens less than this many positions away are visible.

    Returns:
        [B * Hk, R, Dv].
    """
    heads = slots.keys[layer].shape[1]
    stem_keys, stem_values = stems.views(layer, slice(0, index.num_stems), index.longest_stem)
    on_stem = index.alone(torch.bmm(index.grouped(queries, heads), stem_keys), heads)
    own = [slots.views(layer, rows, length) for rows, length in index.chunks]
    scores = torch.cat([on_stem, _own_scores(index, queries, [keys for keys, _ in own], heads)], dim=-1)
    mask = index.mask(window, heads)
    precise = scores if scores.dtype.itemsize >= 4 else scores.float()
    weights = (precise if mask is None else precise.add_(mask)).softmax(dim=-1)
    weights = weights if weights.dtype == stem_values.dtype else weights.to(stem_values.dtype)
    to_stem, to_own = weights.split_with_sizes([index.longest_stem, index.longest], dim=-1)
    output = index.alone(torch.bmm(index.grouped(to_stem, heads), stem_values), heads)
    if len(own) == 1:
        return output.baddbmm_(to_own, own[0][1])
    for (rows, length), (_, values) in zip(index.chunks, own, strict=True):
        of_chunk = of_heads(rows, heads)
        output[of_chunk].baddbmm_(to_own[of_chunk, :, :length], values)
    return output


def _own_scores(index: StepIndex, queries: Tensor, keys: list[Tensor], heads: int) -> Tensor:
    """Return the scores [B * Hk, R, L] of queries [B * Hk, R, D] against the tokens of their slots."""
    if len(keys) == 1:
        return torch.bmm(queries, keys[0])
    scores = queries.new_zeros(*queries.shape[:2], index.longest)
    for (rows, length), chunk in zip(index.chunks, keys, strict=True):
        of_chunk = of_heads(rows, heads)
        scores[of_chunk, :, :length] = torch.bmm(queries[of_chunk], chunk)
    return scores
