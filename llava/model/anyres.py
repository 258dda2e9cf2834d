"""Features of images of any shape: the tiles of mode `anyres` and the padded images of mode `keep`.

anyres  tiles [sum of K, 3, H, W] --tower, projector--> [sum of K, P, D] --merge--> one [T, D] per image
keep    padded images [N, 3, h, w] --cropped, grouped by size--> [n, 3, h', w'] --tower, projector--> [T, D] each
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.errors import ConfigError
from llava.imaging.anyres import ImageGrid, Size, keep_size, unpadded_patches
from llava.model.config import LlavaMedConfig
from llava.processing import LlavaMedProcessor


def grid_of(config: Any, side: int) -> ImageGrid:
    """Return the image grid of a model's configuration; `side` is that of the tower's input in pixels."""
    pinpoints = tuple((width, height) for width, height in config.image_grid_pinpoints or ())
    return ImageGrid(config.image_aspect_ratio, side, config.image_seq_length, config.patch_merge_type, pinpoints)


def merge_tiles(features: Tensor, sizes: Sequence[Size], grid: ImageGrid, newline: Tensor | None) -> list[Tensor]:
    """Merge the tiles of each image.

    Args:
        features: [sum of K, P, D] of the tiles of all images; each image starts with its overview tile.
        sizes: width and height of each image.
        grid: grid of mode `anyres`.
        newline: [D], appended to each row of patches if the merge type is `spatial_unpad`.

    Returns:
        [T, D] for each image.

    Raises:
        ConfigError: the number of tiles is not that of these images.
    """
    counts = [columns * rows + 1 for columns, rows in map(grid.shape, sizes)]
    if sum(counts) != len(features):
        raise ConfigError(f"images of sizes {list(sizes)} have {sum(counts)} tiles, got {len(features)}")
    parts = features.split(counts)
    return [_merged(tiles, size, grid, newline) for tiles, size in zip(parts, sizes, strict=True)]


def _merged(tiles: Tensor, size: Size, grid: ImageGrid, newline: Tensor | None) -> Tensor:
    if grid.merge == "flat":
        return tiles.flatten(0, 1)
    columns, rows = grid.shape(size)
    side, width = grid.side, tiles.shape[-1]
    # [rows, columns, side, side, D] -> the patches in the image's raster order: [rows * side, columns * side, D]
    whole = tiles[1:].view(rows, columns, side, side, width).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    if grid.merge == "spatial_unpad":
        left, top, right, bottom = unpadded_patches(size, (columns * side, rows * side))
        whole = whole[top:bottom, left:right]
        assert newline is not None
        ends = newline.to(whole.dtype).expand(len(whole), 1, width)
        whole = torch.cat([whole, ends], dim=1)
    return torch.cat([tiles[0], whole.flatten(0, 1)])


def project_kept(
    pixels: Tensor, sizes: Sequence[Size], features_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Project images in mode `keep`; those of one size are computed together.

    Args:
        pixels: [N, 3, h, w], each image in the upper left corner.
        sizes: width and height of each image before preprocessing.
        features_of: maps pixels [n, 3, h', w'] to [n, T, D].

    Returns:
        All features [1, sum of T, D], and [T, D] for each image.
    """
    found: dict[int, Tensor] = {}
    for (width, height), members in _by_size(sizes):
        group = features_of(pixels[members, :, :height, :width])
        found.update(zip(members, group, strict=True))
    ordered = [found[number] for number in range(len(sizes))]
    return torch.cat(ordered)[None], ordered


def _by_size(sizes: Sequence[Size]) -> Iterator[tuple[Size, list[int]]]:
    groups: dict[Size, list[int]] = {}
    for number, size in enumerate(sizes):
        groups.setdefault(keep_size(size), []).append(number)
    return iter(groups.items())


def needs_newline(config: Any) -> bool:
    """Return whether a model has a trained newline embedding, which ends each row of patches."""
    return "unpad" in str(config.patch_merge_type)


def new_newline(width: int) -> Tensor:
    """Return a random newline embedding [D]."""
    return torch.randn(width) / math.sqrt(width)


def write_policy(config: LlavaMedConfig, grid: ImageGrid) -> None:
    """Copy a processor's image mode into a configuration."""
    config.image_aspect_ratio = grid.mode
    config.patch_merge_type = grid.merge
    config.image_grid_pinpoints = [list(size) for size in grid.pinpoints] or None


def use_policy(model: Any, processor: LlavaMedProcessor) -> None:
    """Set a model to its processor's image mode; initialize a missing newline embedding randomly.

    Args:
        model: a `LlavaMedForConditionalGeneration`.
        processor: its processor, in the wanted image mode.
    """
    write_policy(model.config, processor.image_grid)
    if needs_newline(model.config) and model.model.image_newline is None:
        table = cast(Tensor, model.get_input_embeddings().weight)
        model.model.image_newline = fresh_newline(table, table.dtype)


def fresh_newline(table: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Return a random newline embedding with the width and device of the embedding table."""
    width = int(getattr(table, "ds_shape", table.shape)[-1])
    return nn.Parameter(new_newline(width).to(table.device, dtype))
