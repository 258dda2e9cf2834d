"""Model inputs of single images as the tensors of one batch.

    [3, H, W] or [P, Dv] each                --stack--> [N, ...]
    tiles [K, 3, H, W] each    (anyres)      --cat----> [sum of K, 3, H, W],          image_sizes [N, 2]
    [3, h, w], any shape each  (keep)        --pad----> [N, 3, largest h, largest w], image_sizes [N, 2]

The sizes are those of the pictures as they were, before any preprocessing: with them the model finds what belongs to
each (`image_grids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.imaging.anyres import Size


class ImageBatch(NamedTuple):
    """Images of a batch.

    Attributes:
        pixel_values: pixels, tiles or tower features; None where there is no image.
        image_sizes: [N, 2] int64 width and height of the pictures, where their inputs have no common shape.
    """

    pixel_values: Tensor | None
    image_sizes: Tensor | None

    def keywords(self) -> dict[str, Tensor]:
        """Keywords for the model's call."""
        named = {"pixel_values": self.pixel_values, "image_sizes": self.image_sizes}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def batch_images(images: Sequence[Tensor], sizes: Sequence[Size] = ()) -> ImageBatch:
    """Put images together.

    Args:
        images: model input of each image.
        sizes: width and height of each picture; empty where all inputs have one shape.
    """
    if not images:
        return ImageBatch(None, None)
    if not sizes:
        return ImageBatch(torch.stack(list(images)), None)
    known = torch.tensor(sizes, dtype=torch.int64)
    if images[0].dim() == 4:
        return ImageBatch(torch.cat(list(images)), known)
    return ImageBatch(torch.stack(_to_one_shape(images)), known)


def join(first: ImageBatch, second: ImageBatch) -> ImageBatch:
    """The images of two batches, one after the other."""
    if first.pixel_values is None or second.pixel_values is None:
        return second if first.pixel_values is None else first
    pixels = torch.cat(_to_one_shape([first.pixel_values, second.pixel_values]))
    if first.image_sizes is None or second.image_sizes is None:
        return ImageBatch(pixels, None)
    return ImageBatch(pixels, torch.cat([first.image_sizes, second.image_sizes]))


def _to_one_shape(images: Sequence[Tensor]) -> list[Tensor]:
    """Images [..., h, w] with zeros at the right and at the bottom of the smaller ones."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return [pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
