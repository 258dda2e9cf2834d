"""Image preprocessing equal, bit for bit, to a PIL image processor of transformers, but faster.

    Opened (L or RGB) --fit_opened, Pillow resize--> crop --table: level to normalized value--> [3, H, W] float32

The processor converts each large image to an array and back, resizes gray as three equal channels, and normalizes each
pixel in double precision, although a channel has only 256 values. Here gray stays one channel up to the last step, and
normalized values are looked up in a table that the processor itself computed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, CLIPImageProcessorPil
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict

from llava.imaging.anyres import Size
from llava.imaging.decode import DecodedImage
from llava.imaging.geometry import Box, check_made, fit_image, is_wasteful, resize_image, to_rgb

_STEPS = ("__call__", "preprocess", "_preprocess", "process_image", "convert_to_rgb", "resize", "rescale", "normalize")
"""Methods that must be transformers' own; `center_crop` is called, so it may be overridden."""


class FastPreprocessor:
    """Preprocessing steps of one image processor; created with `of`."""

    def __init__(self, processor: Any) -> None:
        """Compute the table of a processor that `of` accepts."""
        self.processor = processor
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
        done = processor(images=[ramp], do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"]
        self.table: NDArray[np.float32] = np.ascontiguousarray(done[0][:, 0])
        """[3, 256] normalized value of each level of each channel."""

    @classmethod
    def of(cls, processor: Any) -> FastPreprocessor | None:
        """Return the steps of a processor, or None for a processor with custom steps."""
        plain = all(getattr(type(processor), step, None) is getattr(PilBackend, step) for step in _STEPS)
        if not plain or getattr(processor, "do_pad", None) or not isinstance(processor.resample, int):
            return None
        size = _given(processor.size)
        if processor.do_resize and size not in ({"shortest_edge"}, {"height", "width"}):
            return None
        path = cls(processor)
        return path if path.table.shape == (3, 256) and path.table.dtype == np.float32 else None

    def size_after(self, size: Size) -> Size:
        """Return width and height of an image after resizing, before cropping."""
        wanted = self.processor.size
        if not self.processor.do_resize:
            return size
        if not wanted["shortest_edge"]:
            return wanted["width"], wanted["height"]
        shortest, (width, height) = wanted["shortest_edge"], size
        longest = int(shortest * max(size) / min(size))
        return (shortest, longest) if width <= height else (longest, shortest)

    def pixels(self, image: Image.Image, *, size: Size | None = None, box: Box | None = None) -> Tensor:
        """Return the model's input, `[3, H, W]` float32.

        Args:
            image: mode L or RGB.
            size: original width and height of an image that was decoded at a smaller scale.
            box: part of `image` that shows the image; default: all of it.

        Raises:
            DataError: the image is so thin that the resized image would have more than `MAX_PIXELS`.
        """
        if self.processor.do_resize:
            made, box = self._kept_part(self.size_after(size or image.size), box or (0.0, 0.0, *image.size), image.size)
            image = resize_image(image, made, self.processor.resample, box)
        values = np.asarray(image)
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        if getattr(self.processor, "do_center_crop", False):
            crop = self.processor.crop_size
            values = self.processor.center_crop(values, SizeDict(height=crop["height"], width=crop["width"]))
        found = np.empty((3, *values.shape[1:]), dtype=np.float32)
        for channel, table in enumerate(self.table):
            np.take(table, values[channel % len(values)], out=found[channel], mode="clip")
        return torch.from_numpy(found)

    def _kept_part(self, made: Size, box: Box, given: Size) -> tuple[Size, Box]:
        """Return the part of a resized image that the center crop keeps, if the whole would be too long.

        Args:
            made: size of the whole resized image.
            box: part of the image that is resized.
            given: size of the image.

        Returns:
            Size of the part, and its box in the image; resized, it has the same pixels as in the whole.
        """
        if not is_wasteful(made, given) or not getattr(self.processor, "do_center_crop", False):
            return made, box
        crop = self.processor.crop_size
        left, top, right, bottom = box
        # Even numbers on both sides: halves are then rounded as in the whole, by any rule.
        cut_x, cut_y = (max(0, made[0] - crop["width"]) // 4 * 2, max(0, made[1] - crop["height"]) // 4 * 2)
        step_x, step_y = (right - left) / made[0], (bottom - top) / made[1]
        part = (left + cut_x * step_x, top + cut_y * step_y, right - cut_x * step_x, bottom - cut_y * step_y)
        return (made[0] - 2 * cut_x, made[1] - 2 * cut_y), part


def check_resized(processor: Any, given: Size) -> None:
    """Raise `DataError` for an image that transformers' image processor would resize to an extreme shape."""
    shortest = dict(processor.size).get("shortest_edge") if processor.do_resize else None
    if shortest:
        longest = int(shortest * max(given) / max(1, min(given)))
        made = (shortest, longest) if given[0] <= given[1] else (longest, shortest)
        check_made(made, given)


def _given(size: Any) -> set[str]:
    """Return the names of the fields of a size that are set."""
    return {name for name, value in dict(size).items() if value is not None}


def fit_decoded(
    opened: DecodedImage,
    mode: str,
    *,
    size: tuple[int, int],
    fill: Sequence[int],
    shift: int = 0,
    path: FastPreprocessor | None = None,
) -> tuple[Image.Image, Size, Box]:
    """Return an image that may be gray or scaled as `fit_image` does for `square`, `pad` and `resize`.

    A scaled image keeps the geometry of the original: where its sides or its border are not a whole number of pixels
    at its scale, the box states where it begins and ends.

    Args:
        opened: decoded image.
        mode: `square`, `pad` or `resize`.
        size: height and width of the model's input.
        fill: red, green, blue of the border that `pad` adds.
        shift: offset from the center that `pad` adds.
        path: what resizes the result; with it, thin images are resized along their length before they are padded.

    Returns:
        An image of mode L or RGB, its unscaled width and height, and the box of it to use.

    Raises:
        DataError: the image is so thin that the result would have more than `MAX_PIXELS`.
    """
    image = opened.image
    if mode == "resize":
        height, width = size
        image = resize_image(image, (width, height), Image.Resampling.BICUBIC, opened.box)
        return image, image.size, (0.0, 0.0, width, height)
    if mode == "square" or opened.size[0] == opened.size[1]:
        return image, opened.size, opened.box
    square = (max(opened.size),) * 2
    if path is not None and is_wasteful(square, opened.size):
        return _pad_thin(opened, (int(fill[0]), int(fill[1]), int(fill[2])), shift, path)
    if opened.scale > 1:
        return _pad_scaled(opened, (int(fill[0]), int(fill[1]), int(fill[2])), shift)
    image = fit_image(image, mode, size=size, fill=fill, shift=shift)
    return image, image.size, (0.0, 0.0, *image.size)


def _pad_scaled(opened: DecodedImage, fill: tuple[int, int, int], shift: int) -> tuple[Image.Image, Size, Box]:
    """Return an image padded to a square at its scale, the unscaled size of the square, and its box."""
    (width, height), scale = opened.size, opened.scale
    side = max(width, height)
    image = to_rgb(opened.image)
    # A last column or row that the image only partly fills is blended with the border, if it has one.
    mask = Image.new("L", image.size, 255)
    if width < side and width % scale:
        mask.paste(round(255 * (width % scale) / scale), (image.width - 1, 0, *image.size))
    if height < side and height % scale:
        mask.paste(round(255 * (height % scale) / scale), (0, image.height - 1, *image.size))
    left = ((side - width) // 2 + shift * (width < side)) / scale
    top = ((side - height) // 2 + shift * (height < side)) / scale
    corner = math.ceil(left), math.ceil(top)
    box = (corner[0] - left, corner[1] - top, corner[0] - left + side / scale, corner[1] - top + side / scale)
    square = Image.new("RGB", (math.ceil(box[2]), math.ceil(box[3])), fill)
    square.paste(image, corner, mask)
    return square, (side, side), box


def _pad_thin(
    opened: DecodedImage, fill: tuple[int, int, int], shift: int, path: FastPreprocessor
) -> tuple[Image.Image, Size, Box]:
    """Return a thin image resized along its length to the model's input, with border; see `fit_decoded`."""
    width, height = opened.size
    side = max(width, height)
    wanted = path.size_after((side, side)) if path.processor.do_resize else (side, side)
    is_wide = width > height
    made = (wanted[0], side) if is_wide else (side, wanted[1])
    check_made(made, opened.size)
    thin = (wanted[0], height) if is_wide else (width, wanted[1])
    image = resize_image(to_rgb(opened.image), thin, path.processor.resample, opened.box)
    canvas = Image.new("RGB", made, fill)
    border = (side - min(width, height)) // 2 + shift
    canvas.paste(image, (0, border) if is_wide else (border, 0))
    return canvas, (side, side), (0.0, 0.0, *made)


IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
"""File with the settings of an image processor, in the folder of a tower and of a model."""


class OpenClipImageProcessorPil(CLIPImageProcessorPil):
    """Evaluation transform of open_clip: shortest side resized (bicubic), center crop, normalization.

    The CLIP processor differs only in the center crop with an odd margin: open_clip rounds half a pixel to even, CLIP
    always down. With it, a quarter of all images would be shifted by a pixel relative to the training of the tower.
    """

    def center_crop(self, image: np.ndarray, size: Any, *_: Any, **__: Any) -> np.ndarray:
        """Return the center of `image` [3, H, W], which is at least as large as `size`."""
        top = round((image.shape[1] - size.height) / 2)
        left = round((image.shape[2] - size.width) / 2)
        return image[:, top : top + size.height, left : left + size.width]


OWN_PROCESSORS: dict[str, type[CLIPImageProcessorPil]] = {"OpenClipImageProcessor": OpenClipImageProcessorPil}
"""Processors that transformers does not have, by the type in their files (the class without `Pil`)."""


def load_image_processor(path: str | Path) -> Any:
    """Return the image processor of a folder or hub name, with the PIL backend.

    Raises:
        OSError, ValueError: the processor cannot be read; callers add where it was expected.
    """
    file = Path(path) / IMAGE_PROCESSOR_FILE
    own = None
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        own = OWN_PROCESSORS.get(str(settings.get("image_processor_type")))
    if own is not None:
        return own.from_pretrained(path)
    return cast(Any, AutoImageProcessor).from_pretrained(path, backend="pil")


def output_size(image_processor: Any) -> tuple[int, int]:
    """Return height and width of the output of an image processor."""
    crops = getattr(image_processor, "do_center_crop", False)
    size = image_processor.crop_size if crops else image_processor.size
    if isinstance(size, int):
        return size, size
    shortest = size.get("shortest_edge")
    return (shortest, shortest) if shortest else (size["height"], size["width"])


def cut_share(processor: Any, size: Size) -> float:
    """Return the share of an image that the center crop of a model's processor cuts, from 0 to 1.

    Args:
        processor: a `LlavaMedProcessor`; only image mode `square` crops.
        size: width and height of the image.
    """
    image_processor = processor.image_processor
    crops = processor.image_mode == "square" and getattr(image_processor, "do_center_crop", False)
    shortest = dict(image_processor.size).get("shortest_edge") if crops and image_processor.do_resize else None
    if not crops or min(size) < 1:
        return 0.0
    scale = shortest / min(size) if shortest else 1.0
    width, height = size[0] * scale, size[1] * scale
    crop = image_processor.crop_size
    kept = min(width, crop["width"]) * min(height, crop["height"])
    return float(1.0 - kept / (width * height))
