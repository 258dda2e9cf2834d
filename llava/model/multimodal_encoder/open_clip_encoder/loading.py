"""An open_clip checkpoint's vision trunk as transformers' `Dinov2Model` or `ViTModel` (specification llava-rad 1.3).

Only the trunk is read: projection head, text tower, logit scale and optimizer state are never used by these models, and
stay on disk where the file allows it.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel, ViTModel

from llava.errors import CheckpointError
from llava.model.multimodal_encoder.open_clip_encoder.files import OpenClipFiles
from llava.model.multimodal_encoder.open_clip_encoder.key_map import TRUNK_PREFIX, to_transformers
from llava.model.multimodal_encoder.open_clip_encoder.trunks import trunk_config

logger = logging.getLogger(__name__)

PARALLEL_PREFIX = "module."
POSITIONS = "embeddings.position_embeddings"
MAY_LACK = ("pooler.",)
"""Transformers' ViT has a pooler, timm's has none; nothing here reads it."""


def load_trunk(files: OpenClipFiles, dtype: torch.dtype) -> PreTrainedModel:
    """The vision trunk, in evaluation mode.

    Raises:
        CheckpointError: the file is broken, unsafe, or does not hold the trunk that the configuration describes.
        ConfigError: the trunk is not known.
    """
    config = trunk_config(files.model_config)
    state = to_transformers(read_trunk(files.weights), config.model_type, config.num_hidden_layers)
    with torch.device("meta"):  # every weight comes from the file: nothing is drawn only to be overwritten
        model: PreTrainedModel = Dinov2Model(config) if isinstance(config, Dinov2Config) else ViTModel(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if POSITIONS in state and state[POSITIONS].shape != expected[POSITIONS]:
        state[POSITIONS] = stretched(state[POSITIONS], expected[POSITIONS][1])
    _check(expected, state, files.weights)
    # Copies, since the file may be mapped into memory; zeros in the pooler, so that equal files give equal models.
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}
    pooler = {name: torch.zeros(shape, dtype=dtype) for name, shape in expected.items() if name.startswith(MAY_LACK)}
    model.load_state_dict({**pooler, **weights}, assign=True)
    model.eval()
    return model


def _check(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor], path: Path) -> None:
    needed = {name for name in expected if not name.startswith(MAY_LACK)}
    wrong = [f"{name} is missing" for name in sorted(needed - set(state))]
    wrong += [f"{name} is not known" for name in sorted(set(state) - set(expected))]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name])}"
        for name in sorted(needed & set(state))
        if state[name].shape != expected[name]
    ]
    if wrong:
        raise CheckpointError(
            f"{path} does not hold the vision trunk that its configuration describes: {len(wrong)} weights differ, "
            f"for example {'; '.join(wrong[:3])}"
        )


def read_trunk(path: Path) -> dict[str, Tensor]:
    """The weights below `visual.trunk.` without that prefix, from a training checkpoint or a plain state dictionary.

    Raises:
        CheckpointError: the file is broken, holds more than tensors and plain values, or has no trunk.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return _trunk({name: file.get_tensor(name) for name in file.keys() if TRUNK_PREFIX in name}, path)  # noqa: SIM118
        return _trunk(_read_pickle(path), path)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        problem = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} cannot be read: {problem[0]}") from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # files of torch before 1.6 cannot be mapped into memory
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values and was not loaded; "
            "save its state dictionary alone, where the file is trusted"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dictionary")
    return content


def _trunk(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    plain = {name.removeprefix(PARALLEL_PREFIX): tensor for name, tensor in state.items()}
    found = {
        name.removeprefix(TRUNK_PREFIX): tensor
        for name, tensor in plain.items()
        if name.startswith(TRUNK_PREFIX) and isinstance(tensor, Tensor)
    }
    if not found:
        some = ", ".join(sorted(map(str, plain))[:3]) or "nothing"
        raise CheckpointError(f"{path} has no vision trunk ({TRUNK_PREFIX}*); found {some}")
    return found


def stretched(positions: Tensor, num_positions: int) -> Tensor:
    """A position table [1, 1 + G*G, D] for another grid: class token kept, patches resampled (specification 1.6).

    Raises:
        CheckpointError: one of the grids is no square.
    """
    old, new = (round((count - 1) ** 0.5) for count in (positions.shape[1], num_positions))
    if old * old + 1 != positions.shape[1] or new * new + 1 != num_positions:
        raise CheckpointError(
            f"the position table has {positions.shape[1]} rows, the model {num_positions}: no class token and square "
            "grid on both sides"
        )
    logger.info("position table resampled from %d x %d to %d x %d patches", old, old, new, new)
    grid = positions[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :1], patches], dim=1)
