"""Images of a batch: model inputs of one or of several shapes, in the order of their placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.data.encode import Encoded
from llava.imaging.anyres import Size


class ImageBatch(NamedTuple):
    """Images of a batch.

    Attributes:
        pixel_values: pixels, tiles or tower features; None without images.
        image_sizes: [N, 2] int64 width and height of the images, where their inputs have no common shape; else None.
    """

    pixel_values: Tensor | None
    image_sizes: Tensor | None

    def keywords(self) -> dict[str, Tensor]:
        """Return keyword arguments for the model; None values are left out."""
        named = {"pixel_values": self.pixel_values, "image_sizes": self.image_sizes}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def batch_images(images: Sequence[Tensor], sizes: Sequence[Size] = ()) -> ImageBatch:
    """Return images as one batch.

    Args:
        images: model input of each image.
        sizes: width and height of each image; empty where all inputs have one shape.
    """
    if not images:
        return ImageBatch(None, None)
    if not sizes:
        return ImageBatch(torch.stack(list(images)), None)
    known = torch.tensor(sizes, dtype=torch.int64)
    if images[0].dim() == 4:
        return ImageBatch(torch.cat(list(images)), known)
    return ImageBatch(torch.stack(_to_one_shape(images)), known)


def join_images(first: ImageBatch, second: ImageBatch) -> ImageBatch:
    """Return the images of two batches, those of `first` first."""
    if first.pixel_values is None or second.pixel_values is None:
        return second if first.pixel_values is None else first
    pixels = torch.cat(_to_one_shape([first.pixel_values, second.pixel_values]))
    if first.image_sizes is None or second.image_sizes is None:
        return ImageBatch(pixels, None)
    return ImageBatch(pixels, torch.cat([first.image_sizes, second.image_sizes]))


def _to_one_shape(images: Sequence[Tensor]) -> list[Tensor]:
    """Return images [..., h, w] zero-padded at the right and the bottom to a common height and width."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return [pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]


Place = tuple[Encoded, int]
"""An image in a batch: a sequence, and the index of one of its images."""


def image_places(sequences: Sequence[Encoded]) -> list[Place]:
    """Return all images of sequences that share nothing."""
    return [(sequence, number) for sequence in sequences for number in range(len(sequence.images))]


def shown_images(places: Sequence[Place], images: Mapping[str, Tensor]) -> ImageBatch:
    """Return the model inputs of the placed images as one batch, in order."""
    inputs = [images[sequence.images[number]] for sequence, number in places]
    return batch_images(inputs, [s.image_sizes[number] for s, number in places if s.image_sizes])
