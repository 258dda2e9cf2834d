"""Log-probabilities and values of sampled dialogues before an update: policy, reference, value model.

sequences --laid out as for training--> rows --a model--> numbers of the action tokens of each sequence
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.data.collator import Collator
from llava.data.encode import Encoded
from llava.data.flat_batch import FlatBatch
from llava.model.value_head import ActorCritic
from llava.train.objectives.policy import at_targets
from llava.train.target_logprobs import consumed_logprobs
from llava.train.validation import dropout_off

NUMBER = "number"
"""Number of a sequence in its list, which rows of the layout carry."""

Numbers = list[list[float]]
"""Numbers of the action tokens of each sequence, in the order of the tokens."""


@dataclass(frozen=True, slots=True)
class RolloutScorer:
    """Computes numbers of the action tokens of sequences with the networks of a run.

    Attributes:
        policy: the policy, with its adapter if it has one.
        collator: lays sequences out.
        device: device of the run.
        without: id of a token that is never sampled, or None.
        temperature: divisor of the logits.
        reference: frozen copy of the policy as it started; None where the adapter is switched off, or none is wanted.
        adapter_off: whether the reference is the policy without its adapter.
        critic: policy with a value model, or None.
        precision: context of the products.
    """

    policy: nn.Module
    collator: Collator
    device: torch.device
    without: int | None
    temperature: float
    reference: nn.Module | None = None
    adapter_off: bool = False
    critic: ActorCritic | None = None
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference."""
        return self.reference is not None or self.adapter_off

    def logprobs(self, sequences: Sequence[Encoded]) -> Numbers:
        """Return the log-probabilities under the policy."""
        return self._by_sequence(sequences, lambda row: self._logprobs(self.policy, row))

    def reference_logprobs(self, sequences: Sequence[Encoded]) -> Numbers:
        """Return the log-probabilities under the reference; empty lists without one."""
        if self.reference is not None:
            network = self.reference
            return self._by_sequence(sequences, lambda row: self._logprobs(network, row))
        if not self.adapter_off:
            return [[] for _ in sequences]
        with cast(Any, self.policy).disable_adapter():
            return self._by_sequence(sequences, lambda row: self._logprobs(self.policy, row))

    def values(self, sequences: Sequence[Encoded]) -> Numbers:
        """Return the values; empty lists without a value model."""
        if self.critic is None:
            return [[] for _ in sequences]
        critic = self.critic
        return self._by_sequence(sequences, lambda row: at_targets(critic.values(**row.model_inputs()), row))

    def _logprobs(self, network: nn.Module, row: FlatBatch) -> Tensor:
        logits = at_targets(network(**row.model_inputs()).logits, row)
        return consumed_logprobs(logits, row.target_ids, without=self.without, temperature=self.temperature)

    @torch.no_grad()
    def _by_sequence(self, sequences: Sequence[Encoded], numbers: Callable[[FlatBatch], Tensor]) -> Numbers:
        """Return the numbers [M] of the targets of every row, sorted to the sequences."""
        found: Numbers = [[] for _ in sequences]
        if not sequences:
            return found
        units = [(replace(sequence, numbers={NUMBER: index}),) for index, sequence in enumerate(sequences)]
        collator = self.collator
        images = collator.dataset.images_for(sequences)
        with dropout_off(self.critic or self.policy), self.precision():
            for row in collator.rows(units, images, collator.max_tokens_per_row):
                values = numbers(row.to(self.device)).float().cpu()[row.edge_target].tolist()
                owners = row.sequence_values[NUMBER].long()[row.edge_sequence].tolist()
                for owner, value in zip(owners, values, strict=True):
                    found[owner].append(value)
        return found
