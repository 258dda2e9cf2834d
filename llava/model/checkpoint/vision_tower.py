"""Find a checkpoint's vision tower: given, inside the checkpoint, named by it, or known by name.

--vision-tower FOLDER            mm_vision_tower: FOLDER or hub name
--vision-tower-config, ..._checkpoint      mm_vision_tower_config, mm_vision_tower_checkpoint (open_clip)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, PreTrainedModel

from llava.errors import CheckpointError
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.legacy_keys import PUBLISHED_TOWERS, TOWER_KEYS
from llava.model.config_sizes import auto_config
from llava.model.multimodal_encoder.open_clip_encoder.loading import (
    find_checkpoint,
    find_config,
    find_files,
    is_open_clip,
)
from llava.model.multimodal_encoder.open_clip_encoder.trunks import trunk_config
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line, load_tower, tower_image_processor


@dataclass(frozen=True, slots=True)
class TowerSource:
    """Tower's folder or hub name and, for open_clip, its two files; or a published tower's settings."""

    name: str
    config_file: str | None = None
    checkpoint: str | None = None
    known: dict[str, Any] | None = None

    @property
    def files(self) -> dict[str, str | None]:
        """The open_clip files, as keyword arguments of `load_tower` and `tower_image_processor`."""
        return {"config_file": self.config_file, "checkpoint": self.checkpoint}

    def config(self) -> Any:
        """Return the configuration of the vision encoder.

        Raises:
            CheckpointError: it cannot be read.
        """
        if self.known is not None:
            return CLIPVisionConfig(**self.known)
        if is_open_clip(self.name, self.config_file, self.checkpoint):
            return trunk_config(find_files(self.name, **_renamed(self.files)).model_config)
        try:
            config = auto_config(self.name)
        except UNREADABLE as error:
            raise CheckpointError(
                f"vision tower {self.name} cannot be loaded ({first_line(error)}); pass its folder with --vision-tower"
            ) from error
        return getattr(config, "vision_config", config)

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """Load the encoder with its weights."""
        return load_tower(self.name, dtype, **self.files)

    def image_processor(self, config: Any, folder: Path) -> Any:
        """Return the image processor of the tower, or of the checkpoint's folder if only settings are known."""
        if self.known is not None:
            return tower_image_processor(str(folder), config, None)
        return tower_image_processor(self.name, config, None, **self.files)


def _renamed(files: dict[str, str | None]) -> dict[str, str | None]:
    return {"config": files["config_file"], "checkpoint": files["checkpoint"]}


def find_tower(
    checkpoint: Checkpoint, given: str | None = None, config_file: str | None = None, weights_file: str | None = None
) -> TowerSource:
    """Find the tower of a checkpoint of the legacy kinds.

    Relative names are looked for from the working directory, then in the checkpoint's folder.

    Args:
        checkpoint: the checkpoint.
        given: folder or hub name, instead of the one that the checkpoint names.
        config_file: open_clip model configuration, instead of the one that the checkpoint names.
        weights_file: open_clip weights, instead of those that the checkpoint names.

    Raises:
        CheckpointError: it is not found; names the flag that gives it.
    """
    named = {key: checkpoint.config.get(key) for key in TOWER_KEYS}
    name = given or named["mm_vision_tower"]
    if not given:
        config_file = config_file or named["mm_vision_tower_config"]
        weights_file = weights_file or named["mm_vision_tower_checkpoint"]
    if not name and not (config_file and weights_file):
        raise CheckpointError(f"{checkpoint.path} names no vision tower; pass one with --vision-tower")
    folder = checkpoint.folder
    if config_file and weights_file:
        config = folder / config_file if (folder / config_file).is_file() else find_config(config_file)
        return TowerSource(str(name), str(config), str(find_checkpoint(weights_file, folders=[folder])))
    name = str(name)
    if not given and checkpoint.has_tower and name in PUBLISHED_TOWERS and not Path(name).is_dir():
        return TowerSource(name, known=PUBLISHED_TOWERS[name])
    for place in (Path(name).expanduser(), folder / name):
        if place.is_dir():
            return TowerSource(str(place.resolve()))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return TowerSource(name)
    if name.startswith(("hf-hub:", "local-dir:")):
        return TowerSource(name)
    inside = (
        "its weights are inside, its settings are not" if checkpoint.has_tower else "it is not inside the checkpoint"
    )
    raise CheckpointError(
        f"{checkpoint.path} names the vision tower {name!r}, which is not a folder here ({inside}); "
        "pass its folder or hub name with --vision-tower"
    )
