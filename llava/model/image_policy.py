"""The image mode of a model, in the three places that must agree: processor, configuration, and the row-end token.

processor.image_grid --write_policy--> config.image_aspect_ratio, patch_merge_type, image_grid_pinpoints
                     --use_policy----> the same, and model.image_newline where the merge type has one
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.imaging.anyres import ImageGrid
from llava.model.anyres import needs_newline, new_newline
from llava.model.config import LlavaMedConfig
from llava.processing import LlavaMedProcessor


def write_policy(config: LlavaMedConfig, grid: ImageGrid) -> None:
    """Put a processor's image mode into a configuration."""
    config.image_aspect_ratio = grid.mode
    config.patch_merge_type = grid.merge
    config.image_grid_pinpoints = [list(size) for size in grid.pinpoints] or None


def use_policy(model: Any, processor: LlavaMedProcessor) -> None:
    """Make a model take pictures as its processor gives them; a row-end token that it lacks starts at random.

    Args:
        model: a `LlavaMedForConditionalGeneration`.
        processor: its processor, in the image mode that is wanted.
    """
    write_policy(model.config, processor.image_grid)
    if needs_newline(model.config) and model.model.image_newline is None:
        table = cast(Tensor, model.get_input_embeddings().weight)
        model.model.image_newline = fresh_newline(table, table.dtype)


def fresh_newline(table: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A random row-end token, as long as the rows of the embedding table and on its device."""
    width = int(getattr(table, "ds_shape", table.shape)[-1])
    return nn.Parameter(new_newline(width).to(table.device, dtype))
