"""Value model of PPO: a second adapter on the same weights, a head of the policy, or a separate model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from torch import nn

from llava.errors import ConfigError
from llava.model import lora
from llava.model.checkpoint.load import load_checkpoint, open_checkpoint
from llava.model.checkpoint.load_parts import read_tensors
from llava.model.value_head import VALUE_FILE, ActorCritic, ValueModel, load_into, shared_copy
from llava.train.model import DTYPE
from llava.train.preference import disable_dropout
from llava.train.rollout_args import RolloutSpec
from llava.train.specs import PartsSpec

logger = logging.getLogger(__name__)


def make_critic(policy: nn.Module, spec: RolloutSpec, parts: PartsSpec) -> ActorCritic:
    """Return the policy with its value model.

    Raises:
        LlavaError: the folder cannot be loaded, or its vocabulary has another size, or it is of another kind.
    """
    if spec.value_model == "head":
        return ActorCritic(policy, None)
    if spec.value_model == "adapter":
        return ActorCritic(policy, ValueModel(shared_copy(policy)))
    loaded = load_checkpoint(open_checkpoint(spec.value_model), dtype=DTYPE)
    ours, theirs = (_vocabulary(network) for network in (policy, loaded.model))
    if ours != theirs:
        raise ConfigError(
            f"--value-model {spec.value_model}: a vocabulary of {theirs} tokens, the policy has {ours}; expected a "
            "model of the same family"
        )
    network: nn.Module = loaded.model
    if parts.lora is not None:
        network = lora.add_lora(loaded, **parts.lora)
    lora.freeze_for(network, freeze_projector=True, has_adapter=parts.lora is not None)
    disable_dropout(network)
    value = ValueModel(network)
    _start_head(value, Path(spec.value_model) / VALUE_FILE)
    return ActorCritic(policy, value)


def _start_head(value: ValueModel, path: Path) -> None:
    """Load the head that was trained with a reward model; one of another model starts at zero.

    Raises:
        ConfigError: the file holds the value model of a reinforcement learning run.
    """
    if not path.is_file():
        return
    saved = read_tensors(path)
    if saved.keys() != value.head_state().keys():
        raise ConfigError(
            f"{path} is the value model of a run of reinforcement learning, whose folder holds its policy; expected a "
            "model, or the folder of --objective reward"
        )
    load_into(value.head_state(), saved, path)
    logger.info("value model: starts with the head of %s", path)


def _vocabulary(network: nn.Module) -> int:
    return int(cast(Any, network).get_input_embeddings().weight.shape[0])
