"""Preference training: the reference of a run, its objective, and dropout."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from llava.data.collator import Collator
from llava.data.flat_batch import FlatBatch
from llava.data.preference import PreferenceDataset
from llava.train.objectives.kto import KtoLoss
from llava.train.objectives.pairs import REFERENCE, PairLoss, Reference
from llava.train.preference_args import POLICY_INPUTS, PreferenceSpec
from llava.train.reference import sequence_logprobs
from llava.train.reference_cache import ReferenceScorer, cached_logprobs, check_complete, read_lines
from llava.train.validation import dropout_off

logger = logging.getLogger(__name__)

D = TypeVar("D")

DROPOUT_FIELDS = ("attention_dropout", "dropout", "attn_dropout")
"""Fields in which attention layers of transformers keep the probability of their dropout."""


def disable_dropout(network: nn.Module) -> None:
    """Set the probability of every dropout to 0; modules stay in training mode, which checkpointing needs."""
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in DROPOUT_FIELDS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def with_reference(
    dataset: D,
    spec: PreferenceSpec | None,
    network: nn.Module,
    collator: Collator,
    *,
    folder: Path | None,
    scorer: ReferenceScorer | None = None,
    batch_size: int = 1,
    epochs: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> D:
    """Return pairs that carry their log-probabilities under the reference, if the reference is cached.

    Args:
        dataset: the pairs, or fine-tuning rows, which are returned as they are.
        spec: preference training, or None.
        network: the policy as it starts.
        collator: collator of the dataset.
        folder: output folder; None (a dry run) computes nothing and attaches zeros.
        scorer: the network's weights, precision and device; not needed for a file.
        batch_size: pairs per batch.
        epochs: epochs of the run, in which damaged images may differ.
        rank: rank of this process.
        world_size: number of processes.

    Raises:
        LlavaError: a value is missing, unreadable or not finite.
    """
    if spec is None or spec.ref_mode != "cached":
        return dataset
    assert isinstance(dataset, PreferenceDataset)
    if folder is None:
        logger.info("a dry run computes no reference: its loss has no meaning")
        return cast(D, dataset.with_numbers({REFERENCE: _Zeros()}))
    if spec.ref_logprobs is not None:
        values = read_lines(Path(spec.ref_logprobs))
        check_complete(values, collator, spec.ref_logprobs, epochs=epochs)
    else:
        assert scorer is not None
        ranks = {"rank": rank, "world_size": world_size, "epochs": epochs}
        network.to(scorer.device)
        values = cached_logprobs(network, collator, scorer, folder=folder, batch_size=batch_size, **ranks)
    return cast(D, dataset.with_numbers({REFERENCE: values}))


class _Zeros(dict[str, float]):
    """Mapping that holds 0 for every key."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> float:
        return 0.0


def reference_function(network: nn.Module, mode: str, device: torch.device) -> Reference | None:
    """Return the function that computes the reference in each step.

    None where rows carry it or no loss needs it.

    Args:
        network: the policy as it starts, not wrapped for several processes.
        mode: see `PreferenceSpec.ref_mode`.
        device: device of the run.
    """
    if mode in ("copy", POLICY_INPUTS):
        frozen = copy.deepcopy(network).to(device).requires_grad_(False)
        frozen.eval()
        if mode == POLICY_INPUTS:
            share_inputs(frozen, network)
        return lambda batch: sequence_logprobs(frozen, batch)
    if mode != "adapter_off":
        return None
    start = beside_adapter(network, device)

    def as_it_started(batch: FlatBatch) -> Tensor:
        with torch.no_grad(), adapter_off(network), holding(start), dropout_off(network):
            return sequence_logprobs(network, batch)

    return as_it_started


def beside_adapter(network: nn.Module, device: torch.device) -> list[tuple[nn.Parameter, Tensor]]:
    """Return frozen copies of the trained weights that disabling the adapter does not restore."""
    return [
        (parameter, parameter.detach().clone().to(device))
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and "lora_" not in name and ".modules_to_save." not in name
    ]


@contextmanager
def holding(weights: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Context in which parameters hold other values."""
    own = [parameter.data for parameter, _ in weights]
    for parameter, values in weights:
        parameter.data = values
    try:
        yield
    finally:
        for (parameter, _), values in zip(weights, own, strict=True):
            parameter.data = values


@contextmanager
def adapter_off(network: nn.Module) -> Iterator[None]:
    """Context in which a network computes without its adapter, if it has one."""
    if not isinstance(network, PeftModel):
        yield
        return
    trained = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")  # biases have a copy
            with network.disable_adapter():
                yield
    finally:
        for parameter, is_trained in trained:  # peft makes every adapter train when it is switched on again
            parameter.requires_grad_(is_trained)


def share_inputs(frozen: nn.Module, network: nn.Module) -> None:
    """Give a copied network the original's own tower, projector and embeddings, which continue to train."""
    own, policy = (cast(Any, one.get_base_model() if isinstance(one, PeftModel) else one) for one in (frozen, network))
    for name in ("vision_tower", "multi_modal_projector"):
        setattr(own.model, name, getattr(policy.model, name))
    own.set_input_embeddings(policy.get_input_embeddings())


def make_preference_loss(spec: PreferenceSpec, network: nn.Module, device: torch.device) -> PairLoss | KtoLoss:
    """Return the objective of preference training, with the reference that its mode computes."""
    if spec.is_kto:
        reference = reference_function(network, spec.ref_mode, device)
        assert reference is not None
        return KtoLoss(reference, beta=spec.losses.beta, weights=spec.kto_weights)
    return PairLoss(spec.losses, reference=reference_function(network, spec.ref_mode, device))
