"""Engines that sample the dialogues of a run: a copy of the policy, the policy itself, or a server.

policy (adapters beside its layers, float32 under autocast) --once per rollout--> plain layers in one precision

A token of a dialogue passes every layer. With adapters each layer is several products, and under autocast it casts its
weights again for every token, which takes longer than the products of a small model. A copy pays both once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llava.data.flat_batch import Layout
from llava.errors import ConfigError
from llava.generation.engine import LocalEngine
from llava.generation.remote import RemoteEngine
from llava.model.quantization import quantized_layers
from llava.processing import LlavaMedProcessor
from llava.train.rollout.rollout import Converse
from llava.train.rollout_args import RolloutSpec

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Largest share of the free memory that a copy of the policy may need."""


def conversing(
    policy: nn.Module,
    processor: LlavaMedProcessor,
    spec: RolloutSpec,
    *,
    layout: Layout,
    model: str,
    precision: Callable[[], AbstractContextManager[Any]],
    bf16: bool,
) -> Converse:
    """Return `converse` of the server of `--engine`, or of an engine around the policy or a copy of it.

    Args:
        policy: a model, or a peft model around it.
        processor: its processor.
        spec: sizes, and the URL of a server.
        layout: layout of prompts.
        model: name of the policy, which a server of several models serves it under.
        precision: context in which the policy computes.
        bf16: whether it computes in bfloat16.
    """
    if spec.engine is not None:
        return sampling_server(spec.engine, model, processor, spec).converse
    make_engine = partial(LocalEngine, processor=processor, max_slots=spec.slots, layout=layout)
    if copies_help(policy, bf16=bf16):

        def converse_copy(scripts: Any, sampling: Any) -> Any:
            return make_engine(sampling_copy(policy, bf16=bf16)).converse(scripts, sampling)

        return converse_copy
    engines: list[LocalEngine] = []  # made on first use

    def converse(scripts: Any, sampling: Any) -> Any:
        if not engines:
            engines.append(make_engine(policy))
        with precision():
            return engines[0].converse(scripts, sampling)

    return converse


def copies_help(policy: nn.Module, *, bf16: bool) -> bool:
    """Return whether a copy of a policy samples faster: with adapters or casts, on a CPU with room for it."""
    weights = list(policy.parameters())
    has_adapters = any(isinstance(module, BaseTunerLayer) for module in policy.modules())
    # On a GPU the copy would take memory that the updates need; 4-bit weights have no exact sum with an adapter.
    if weights[0].device.type != "cpu" or not (has_adapters or bf16) or quantized_layers(policy):
        return False
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return bool(size < MEMORY_SHARE * psutil.virtual_memory().available)


@torch.no_grad()
def sampling_copy(policy: nn.Module, *, bf16: bool) -> Any:
    """Return a copy of the policy as it is now, with merged adapters; see the module.

    Args:
        policy: a model, or a peft model around it; it is not changed.
        bf16: whether the weights of the copy are cast to bfloat16, after the adapters are merged.
    """
    network = cast(Any, copy.deepcopy(policy))
    if hasattr(network, "merge_and_unload"):
        network = network.merge_and_unload()
    network.requires_grad_(False)
    return network.to(torch.bfloat16) if bf16 else network


def sampling_server(url: str, model: str, processor: LlavaMedProcessor, spec: RolloutSpec) -> RemoteEngine:
    """Return the engine of the server that samples the dialogues of a run.

    Raises:
        ConfigError: it serves several models, none of them under the name of `model`.
        GenerationError: it cannot be reached.
    """
    options: dict[str, Any] = {"processor": processor, "max_concurrency": spec.slots}
    try:
        engine = RemoteEngine(url, Path(model).name, **options)
    except ConfigError:
        engine = RemoteEngine(url, **options)  # the only model, under another name
    logger.warning(
        "%s samples the dialogues with the fixed weights of %s, while the policy changes; ratios are "
        "computed with its log-probabilities",
        *(engine.server.url, engine.facts.name),
    )
    return engine
