"""Engines that sample the dialogues of a run: a copy of the policy, the policy itself, or a server.

policy (adapters beside its layers, float32 under autocast) --for every call--> plain layers in one precision

A token of a dialogue passes every layer. With adapters each layer is several products, and under autocast it casts its
weights again for every token, which takes longer than the products of a small model. A copy pays both once.
"""

from __future__ import annotations

import copy
import logging
import os
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

MEMORY_SHARE = 1 / 8
"""Largest share of a machine's memory that the weights of the policies on it may have where copies are made.

The whole memory counts, not what is free at the start, so that a resumed run samples as the interrupted one."""


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

    Raises:
        ConfigError: the server has several models, none of them under the name of the policy.
        GenerationError: the server cannot be reached.
    """
    if spec.engine is not None:
        return sampling_server(spec.engine, model, processor, spec).converse
    make_engine = partial(LocalEngine, processor=processor, max_slots=spec.slots, layout=layout)
    if copies_help(policy, bf16=bf16):
        logger.info("dialogues are sampled from a copy of the policy, in %s", "bfloat16" if bf16 else "its precision")

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
    # On a GPU the copy would take memory that the updates need; weights of few bits have no exact sum with an adapter.
    if weights[0].device.type != "cpu" or not (has_adapters or bf16) or quantized_layers(policy):
        return False
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    num_policies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return bool(size * num_policies <= MEMORY_SHARE * psutil.virtual_memory().total)


@torch.no_grad()
def sampling_copy(policy: nn.Module, *, bf16: bool) -> Any:
    """Return a copy of the policy as it is now, with merged adapters.

    Args:
        policy: a model, or a peft model around it; it is not changed.
        bf16: whether the parameters of the copy are cast to bfloat16, after the adapters are merged.
    """
    network = cast(Any, copy.deepcopy(policy))
    for name in ("forward", "_original_forward"):  # accelerate's, which would keep the copy in a reference cycle
        vars(network).pop(name, None)
    if hasattr(network, "merge_and_unload"):
        network = network.merge_and_unload()
    network.disable_input_require_grads()  # a hook on the embedding, which would also prevent fast decoding steps
    network.requires_grad_(False)
    for weight in network.parameters() if bf16 else ():
        weight.data = weight.data.to(torch.bfloat16)  # parameters only: rotary frequencies need float32
    return network


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
