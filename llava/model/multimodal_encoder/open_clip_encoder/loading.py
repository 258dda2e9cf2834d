"""Load an open_clip checkpoint's vision trunk as transformers' `Dinov2Model` or `ViTModel`.

Only the trunk is read: these models do not use the projection head, text tower, logit scale and optimizer state, which
stay on disk where the file format allows it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel, ViTModel

from llava.errors import CheckpointError, ConfigError
from llava.model.multimodal_encoder.open_clip_encoder.trunks import TRUNK_PREFIX, to_transformers, trunk_config
from llava.model.torch_files.loading import load_torch_file
from llava.utils.file_kinds import utf8_text

HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"
HUB_CONFIG = "open_clip_config.json"
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MODEL_CONFIGS = Path(__file__).parent / "model_configs"

CONFIG_ALIASES = {"biomedclipcxr_518.json": "biomedclip_cxr_518.json"}
"""The published configuration has two spellings: the one its scripts pass, and its file name on the hub."""

WEIGHTS_VARIABLE = "LLAVA_WEIGHTS"
"""Environment variable with a folder of downloaded weights, in which checkpoints are found by file name."""

PUBLISHED = {"biomedclipcxr_518_checkpoint.pt": "microsoft/llava-rad"}
"""Checkpoint files that commands name without a path, and the hub repository that publishes them."""


@dataclass(frozen=True, slots=True)
class OpenClipFiles:
    """Files of an open_clip tower.

    Attributes:
        model_config: open_clip's model configuration (`embed_dim`, `vision_cfg`, `text_cfg`).
        preprocess: `preprocess_cfg` of a hub configuration, else empty.
        weights: the checkpoint.
    """

    model_config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path


def is_open_clip(tower: str, config: str | None, checkpoint: str | None) -> bool:
    """Return whether a tower is an open_clip tower: by its two files, its prefix, or its folder."""
    if config and checkpoint:
        return True
    return tower.startswith((HUB_PREFIX, FOLDER_PREFIX)) or (Path(tower) / HUB_CONFIG).is_file()


def find_files(tower: str, config: str | None = None, checkpoint: str | None = None) -> OpenClipFiles:
    """Find the files of an open_clip tower; explicit files take precedence over the folder or hub.

    Args:
        tower: a name (with both files given), a folder, or `hf-hub:OWNER/MODEL`.
        config: model configuration: a path, or the file name of one in this package.
        checkpoint: weights: a path, or the name of a file in `$LLAVA_WEIGHTS` or published on the hub.

    Raises:
        CheckpointError: a file is missing or broken; the message lists where it was looked for.
        ConfigError: only one of the two files is given for a tower that has no others.
    """
    is_folder = tower.startswith((HUB_PREFIX, FOLDER_PREFIX)) or (Path(tower) / HUB_CONFIG).is_file()
    if not is_folder and not (config and checkpoint):
        raise ConfigError(
            "an open_clip tower needs two files: its model configuration (--vision-tower-config) and its weights "
            f"(--vision-tower-checkpoint); got {config} and {checkpoint}"
        )
    found_config = find_config(config) if config else _from_repository(tower, (HUB_CONFIG,))
    weights = find_checkpoint(checkpoint) if checkpoint else _from_repository(tower, HUB_WEIGHTS)
    content = _read_json(found_config)
    if "model_cfg" in content:
        return OpenClipFiles(content["model_cfg"], content.get("preprocess_cfg") or {}, weights)
    return OpenClipFiles(content, {}, weights)


def find_config(name: str) -> Path:
    """Find a model configuration by path, or by the name of a file in this package.

    Raises:
        CheckpointError: it does not exist; the message lists what was tried.
    """
    given = Path(name).expanduser()
    built_in = MODEL_CONFIGS / CONFIG_ALIASES.get(given.name, given.name)
    for path in (given, built_in):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in MODEL_CONFIGS.glob("*.json")))
    raise CheckpointError(f"no open_clip model configuration {name}; looked for {given}, and among: {known}")


def find_checkpoint(name: str, *, folders: Sequence[str | Path] = ()) -> Path:
    """Find a tower's weights by path, then by name in `folders`, in `$LLAVA_WEIGHTS`, and on the hub.

    Args:
        name: path or file name.
        folders: more folders to look in, for example that of the model that names this tower.

    Raises:
        CheckpointError: it is not found; the message lists everything that was tried.
    """
    given = Path(name).expanduser()
    places = [given, *(Path(folder) / given for folder in folders)]
    if local := os.environ.get(WEIGHTS_VARIABLE):
        places.append(Path(local).expanduser() / given.name)
    for place in places:
        if place.is_file():
            return place
    tried = [str(place) for place in places]
    if not local:
        tried.append(f"${WEIGHTS_VARIABLE} (not set)")
    if repository := PUBLISHED.get(given.name):
        try:
            return _download(repository, given.name)
        except OSError as error:
            tried.append(f"hub repository {repository} ({type(error).__name__})")
    raise CheckpointError(f"no weights {name} for the vision tower; tried: {'; '.join(tried)}")


def _from_repository(tower: str, names: Sequence[str]) -> Path:
    """Return the first of several files that a folder or hub repository holds."""
    if tower.startswith(HUB_PREFIX):
        repository, problem = tower.removeprefix(HUB_PREFIX), ""
        for name in names:
            try:
                return _download(repository, name)
            except OSError as error:
                problem = f" ({type(error).__name__})"
        raise CheckpointError(f"hub repository {repository} has none of {', '.join(names)}{problem}")
    folder = Path(tower.removeprefix(FOLDER_PREFIX)).expanduser()
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} is not an open_clip tower; expected {' or '.join(names)}")


def _download(repository: str, name: str) -> Path:
    return Path(hf_hub_download(repository, name))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(utf8_text(path.read_bytes(), takes_mark=False))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; expected an open_clip model configuration")
    return cast(dict[str, Any], content)


logger = logging.getLogger(__name__)

PARALLEL_PREFIX = "module."
POSITIONS = "embeddings.position_embeddings"
MAY_LACK = ("pooler.",)
"""Weights that transformers' ViT has and timm's lacks; nothing here reads them."""


def load_trunk(files: OpenClipFiles, dtype: torch.dtype) -> PreTrainedModel:
    """Load the vision trunk, in evaluation mode.

    Raises:
        CheckpointError: the file is broken, unsafe, or does not hold the trunk that the configuration describes.
        ConfigError: the trunk is unknown.
    """
    config = trunk_config(files.model_config)
    state = to_transformers(read_trunk(files.weights), config.model_type, config.num_hidden_layers)
    with torch.device("meta"):  # every weight comes from the file, so none is initialized
        model: PreTrainedModel = Dinov2Model(config) if isinstance(config, Dinov2Config) else ViTModel(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if POSITIONS in state and state[POSITIONS].shape != expected[POSITIONS]:
        state[POSITIONS] = resampled_positions(state[POSITIONS], expected[POSITIONS][1])
    _check(expected, state, files.weights)
    # Copies, since the file may be memory-mapped; zeros in the pooler, so that equal files give equal models.
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
    """Read the weights under `visual.trunk.`, without that prefix, of a checkpoint or a state dictionary.

    Raises:
        CheckpointError: the file is broken, holds more than tensors and plain values, or has no trunk.
    """
    if path.suffix != ".safetensors":
        return _trunk(_read_pickle(path), path)
    try:
        with safe_open(path, framework="pt") as file:
            return _trunk({name: file.get_tensor(name) for name in file.keys() if TRUNK_PREFIX in name}, path)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        problem = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} cannot be read: {problem[0]}") from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    content = load_torch_file(path, mmap=True)
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


def resampled_positions(positions: Tensor, num_positions: int) -> Tensor:
    """Resample a position table [1, 1 + G*G, D] to another grid; the class token is kept.

    Raises:
        CheckpointError: one of the grids is not square.
    """
    old, new = (round((count - 1) ** 0.5) for count in (positions.shape[1], num_positions))
    if old * old + 1 != positions.shape[1] or new * new + 1 != num_positions:
        raise CheckpointError(
            f"the position table has {positions.shape[1]} rows, the model {num_positions}; expected a class token and "
            "a square grid in both"
        )
    logger.info("position table resampled from %d x %d to %d x %d patches", old, old, new, new)
    grid = positions[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :1], patches], dim=1)
