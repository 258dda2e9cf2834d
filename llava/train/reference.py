"""Log-probabilities of whole sequences under a model, for preference training and its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.data.flat_batch import CausalModel, FlatBatch, target_logits
from llava.train.target_logprobs import consumed_logprobs


def sequence_logprobs(model: CausalModel, batch: FlatBatch, *, without: int | None = None) -> Tensor:
    """Return the log-probability of the trained tokens of each sequence, [num_sequences] float64.

    Example::

        chosen, rejected = sequence_logprobs(model, flatten(pair, images, image_token_id=image_token_id))

    Args:
        model: the model, or an adapter around it; gradients flow unless they are switched off.
        batch: sequences laid out as a row.
        without: id of a token whose logit is excluded, or None.
    """
    logprobs = consumed_logprobs(target_logits(model, batch), batch.target_ids, without=without)
    return sequence_sums(logprobs, batch)


def sequence_sums(values: Tensor, batch: FlatBatch) -> Tensor:
    """Return each sequence's sum of its targets' values [M] over its edges, [num_sequences] float64."""
    # Sums of long answers in float32 would lose more than the differences that a preference loss measures.
    wide = values.double()[batch.edge_target]
    return wide.new_zeros(batch.num_sequences).index_add(0, batch.edge_sequence, wide)


def sequence_tokens(batch: FlatBatch) -> Tensor:
    """Return the number of trained tokens of each sequence, [num_sequences] float64."""
    ones = torch.ones(len(batch.edge_sequence), dtype=torch.float64, device=batch.edge_sequence.device)
    return ones.new_zeros(batch.num_sequences).index_add(0, batch.edge_sequence, ones)
