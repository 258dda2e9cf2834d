"""Engines that sample the dialogues of a run: a copy of the policy, the policy itself, or a server.

policy (adapters beside its layers) --for every call--> copy of plain layers with the same products

A token of a dialogue passes every layer, and an adapter makes several small products of each. In a copy the adapters
are merged, so that the decoding step for plain layers computes it.
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
) -> Converse:
    """Return `converse` of the server of `--engine`, or of an engine around the policy or a copy of it.

    Args:
        policy: a model, or a peft model around it.
        processor: its processor.
        spec: sizes, and the URL of a server.
        layout: layout of prompts.
        model: name of the policy, which a server of several models serves it under.
        precision: context in which the policy computes, such as autocast.

    Raises:
        ConfigError: the server has several models, none of them under the name of the policy.
        GenerationError: the server cannot be reached.
    """
    if spec.engine is not None:
        return sampling_server(spec.engine, model, processor, spec).converse
    make_engine = partial(LocalEngine, processor=processor, max_slots=spec.slots, layout=layout)
    if copies_help(policy, precision):
        logger.info("dialogues are sampled from a copy of the policy with merged adapters")

        def converse_copy(scripts: Any, sampling: Any) -> Any:
            return make_engine(sampling_copy(policy)).converse(scripts, sampling)

        return converse_copy
    engines: list[LocalEngine] = []  # made on first use

    def converse(scripts: Any, sampling: Any) -> Any:
        if not engines:
            engines.append(make_engine(policy))
        with precision():
            return engines[0].converse(scripts, sampling)

    return converse


def copies_help(policy: nn.Module, precision: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Return whether a merged copy samples the same faster: adapters in float32 on a CPU with room for it.

    Args:
        policy: a model, or a peft model around it.
        precision: context in which it computes.
    """
    weights = list(policy.parameters())
    has_adapters = any(isinstance(module, BaseTunerLayer) for module in policy.modules())
    with precision():
        is_precise = not torch.is_autocast_enabled("cpu") and {weight.dtype for weight in weights} == {torch.float32}
    # A sum in bfloat16, or of weights of few bits, rounds small adapters away: the copy would sample from another
    # distribution than the one that is trained. On a GPU the copy would take memory that the updates need.
    if weights[0].device.type != "cpu" or not has_adapters or not is_precise or quantized_layers(policy):
        return False
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    num_policies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return bool(size * num_policies <= MEMORY_SHARE * psutil.virtual_memory().total)


@torch.no_grad()
def sampling_copy(policy: nn.Module) -> Any:
    """Return a copy of the policy as it is now, with merged adapters; the policy is not changed.

    Args:
        policy: a peft model.
    """
    adapted = cast(Any, copy.deepcopy(policy))
    for name in ("forward", "_original_forward"):  # accelerate's, which would keep the copy in a reference cycle
        vars(adapted).pop(name, None)
    network = adapted.merge_and_unload()
    network.disable_input_require_grads()  # a hook on the embedding, which would also prevent fast decoding steps
    return network.requires_grad_(False)


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
