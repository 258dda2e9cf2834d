"""Number and layout of the model tokens of an image, computed from its size only.

    size of an image --ImageGrid--> tiles or resized image --> tokens after the patches of the tower are merged

In most image modes every image has the same number of tokens. Two modes of LLaVA-Med 1.5 differ:

- `anyres` shows the whole image scaled down to one tile of the tower's input size, then the image cut into tiles;
- `keep` keeps the aspect ratio of the image, so the grid of patches depends on it.

Sizes are `(width, height)` in pixels throughout, as in Pillow and the published configurations.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isqrt
from typing import Any

from llava.errors import ConfigError, DataError

Size = tuple[int, int]

ANYRES, KEEP = "anyres", "keep"
VARIABLE_MODES = (ANYRES, KEEP)
"""Image modes in which the number of tokens depends on the size of the image."""

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
"""How the patches of the tiles of an `anyres` image are merged: tile by tile; row by row of the whole image; the same
without rows or columns that only show the border, and with a trained token at the end of each row."""

KEEP_SHORT, KEEP_LONG = 224, 448
"""Mode `keep`: the shorter side in pixels, or less if the longer one would exceed its limit."""

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Columns and rows of tiles that a new model can use, as in LLaVA 1.6."""


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """Settings that map the size of an image to its tokens.

    Attributes:
        mode: image mode.
        tile: side of the tower's input in pixels.
        num_tokens: number of tokens of one tile (P).
        merge: one of `MERGE_TYPES`, for `anyres`.
        pinpoints: sizes in pixels that `anyres` selects from, each a multiple of the tile.
    """

    mode: str
    tile: int
    num_tokens: int
    merge: str = "flat"
    pinpoints: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: unknown merge type; pinpoints not multiples of a tile; a class token among the patches.
        """
        if self.merge not in MERGE_TYPES:
            raise ConfigError(f"unknown mm_patch_merge_type {self.merge!r}; known: {', '.join(MERGE_TYPES)}")
        if self.mode != ANYRES:
            return
        wrong = [size for size in self.pinpoints if min(size) < 1 or size[0] % self.tile or size[1] % self.tile]
        if wrong or not self.pinpoints:
            found = f"got {list(wrong[0])}" if wrong else "got none"
            raise ConfigError(
                f"image mode anyres needs image_grid_pinpoints of [width, height], each a multiple of {self.tile} "
                f"pixels (the input size of the tower); {found}"
            )
        if self.merge != "flat" and self.num_tokens != self.side**2:
            raise ConfigError(
                f"mm_patch_merge_type {self.merge} needs a square number of patches, but a tile has {self.num_tokens} "
                "tokens; use mm_vision_select_feature patch, or the merge type flat"
            )

    @property
    def side(self) -> int:
        """Return the number of patches on a side of a tile."""
        return isqrt(self.num_tokens)

    @property
    def patch(self) -> int:
        """Return the side of a patch in pixels."""
        return self.tile // self.side

    @property
    def num_extra(self) -> int:
        """Return the number of tokens of a tile that are not patches (a selected class token)."""
        return self.num_tokens - self.side**2

    def shape(self, size: Size) -> Size:
        """Return columns and rows of tiles of an `anyres` image, without the tile that shows all of it."""
        width, height = best_size(size, self.pinpoints)
        return width // self.tile, height // self.tile

    def patches_kept(self, size: Size) -> Size:
        """Return columns and rows of patches of an image in mode `keep`.

        Raises:
            DataError: the image is so narrow that its shorter side is less than a patch.
        """
        width, height = keep_size(size)
        if min(width, height) < self.patch:
            raise DataError(
                f"image mode keep scales an image of {size[0]} x {size[1]} pixels to {width} x {height}, less than a "
                f"patch of {self.patch}; use image mode pad"
            )
        return width // self.patch, height // self.patch

    def count(self, size: Size) -> int:
        """Return the number of tokens of an image of `size`.

        Raises:
            DataError: see `patches_kept`.
        """
        if self.mode == KEEP:
            columns, rows = self.patches_kept(size)
            return columns * rows + self.num_extra
        if self.mode != ANYRES:
            return self.num_tokens
        columns, rows = self.shape(size)
        if self.merge != "spatial_unpad":
            return (columns * rows + 1) * self.num_tokens
        left, top, right, bottom = unpadded_patches(size, (columns * self.side, rows * self.side))
        return self.num_tokens + (right - left + 1) * (bottom - top)


def keep_size(size: Size) -> Size:
    """Return the size to which mode `keep` scales an image, with its aspect ratio."""
    short, long = min(size), max(size)
    edge = max(1, int(min(KEEP_LONG / (long / short), KEEP_SHORT)))
    other = int(edge * long / short)
    return (edge, other) if size[0] <= size[1] else (other, edge)


def best_size(size: Size, choices: Sequence[Size]) -> Size:
    """Return the size that keeps most pixels of an image; ties go to the least border, then to the first."""
    width, height = size

    def worth(choice: Size) -> tuple[int, int]:
        scale = min(choice[0] / width, choice[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, -(choice[0] * choice[1] - shown)

    return max(choices, key=worth)


def fit_centered(size: Size, target: Size) -> tuple[Size, Size]:
    """Return size and top left corner of an image that is fitted into the center of `target`."""
    scale_x, scale_y = target[0] / size[0], target[1] / size[1]
    if scale_x < scale_y:
        scaled = target[0], min(ceil(size[1] * scale_x), target[1])
    else:
        scaled = min(ceil(size[0] * scale_y), target[0]), target[1]
    return scaled, ((target[0] - scaled[0]) // 2, (target[1] - scaled[1]) // 2)


def unpadded_patches(size: Size, patches: Size) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom (exclusive) of the patches that show more than the border.

    Args:
        size: size of the image.
        patches: columns and rows of patches of all its tiles together.
    """
    columns, rows = patches
    # Rounded as in the published code: the scale is computed first, then multiplied.
    if size[0] / size[1] > columns / rows:
        border = (rows - int(size[1] * (columns / size[0]))) // 2
        return 0, border, columns, rows - border
    border = (columns - int(size[0] * (rows / size[1]))) // 2
    return border, 0, columns - border, rows


def parse_pinpoints(given: Any, tile: int) -> tuple[Size, ...]:
    """Return the pinpoints given as a list or as its text; None gives those of LLaVA 1.6 for this tile.

    Raises:
        ConfigError: the value is not a list of pairs.
    """
    if not given:
        return tuple((columns * tile, rows * tile) for columns, rows in GRIDS)
    try:
        pairs = ast.literal_eval(given) if isinstance(given, str) else given
        return tuple((int(width), int(height)) for width, height in pairs)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ConfigError(f"image_grid_pinpoints {given!r} is not a list of [width, height]") from error
