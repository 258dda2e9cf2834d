"""Convert, fit, pad and tile images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from llava.errors import ConfigError, DataError
from llava.imaging.anyres import Size, fit_centered, keep_size
from llava.imaging.grayscale import levels_of

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

IMAGE_MODES = ("square", "pad", "resize", "keep", "anyres")
"""Image modes: see `fit`, and `tiles` for `anyres`."""

MAX_PIXELS = 89_478_485
"""Largest number of pixels (width x height) that is decoded or made: the limit of Pillow, a quarter GiB of RGB."""

MAX_GROWTH, SMALL = 16, 1 << 24
"""Intermediate images of more than `SMALL` pixels must not be larger than their source by more than this factor."""

_RASTER_MODES = ("RGB", "L", "1", "CMYK", "YCbCr", "LAB", "HSV")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any image as RGB, by the policies of `llava/imaging/decode.py`.

    Raises:
        DataError: a floating-point image holds values that are not finite.
    """
    plain = to_gray_or_rgb(image)
    return plain if plain.mode == "RGB" else plain.convert("RGB")


def to_gray_or_rgb(image: Image.Image) -> Image.Image:
    """Return any image as RGB, or as L if it is gray; images of these modes are returned unchanged."""
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith(("I", "F")):
        return windowed_levels(np.asarray(image))
    if image.mode in _RASTER_MODES:
        return image.convert("RGB")
    # Palettes and alpha: conversion through RGBA keeps the stored colors of transparent pixels.
    return image.convert("RGBA").convert("RGB")


def windowed_levels(values: np.ndarray) -> Image.Image:
    """Return `[H, W]` or `[H, W, 3]` values, scaled linearly over their range, as an 8-bit image.

    Raises:
        DataError: a value is not finite.
    """
    found = levels_of(values)
    exact = (values if found is None else found.values).astype(np.float64)
    low, high = float(exact.min()), float(exact.max())
    if not np.isfinite([low, high]).all():
        raise DataError("the image holds values that are not finite")
    scale = 255.0 / (high - low) if high > low else 0.0
    gray = np.rint((exact - low) * scale).astype(np.uint8)
    return Image.fromarray(gray if found is None else np.take(gray, found.places, mode="clip"))


def is_wasteful(made: Size, given: Size) -> bool:
    """Return whether an intermediate image would have an extreme shape, as happens with thin images."""
    num_made, num_given = made[0] * made[1], given[0] * given[1]
    return num_made > MAX_PIXELS or num_made > max(SMALL, MAX_GROWTH * num_given)


def check_made(made: Size, given: Size) -> None:
    """Raise `DataError` if resizing an image of size `given` would exceed `MAX_PIXELS`."""
    if made[0] * made[1] > MAX_PIXELS:
        raise DataError(
            f"an image of {given[0]} x {given[1]} pixels would be resized to {made[0]} x {made[1]}, more than the "
            f"limit of {MAX_PIXELS} pixels; cut it, or use image mode resize"
        )


def resize_image(image: Image.Image, size: Size, resample: int, box: Box | None = None) -> Image.Image:
    """Return the image, or a box of it, resized as Pillow does, without extreme intermediate sizes.

    Args:
        image: any image that Pillow resizes.
        size: width and height of the result.
        resample: filter of Pillow.
        box: left, top, right, bottom of the part to resize; default: all of it.
    """
    check_made(size, image.size)
    left, top, right, bottom = box or (0.0, 0.0, *image.size)
    # Pillow resizes rows first, to an intermediate image of all source rows. For a thin upright image the other order
    # is bounded; rounding in between may then differ by two gray levels.
    if is_wasteful((size[0], round(bottom - top)), image.size):
        image = image.resize((image.width, size[1]), resample, box=(0.0, top, image.width, bottom))
        top, bottom = 0.0, float(image.height)
    return image.resize(size, resample, box=(left, top, right, bottom))


def mean_color(image_mean: Sequence[float]) -> tuple[int, int, int]:
    """Return the fill color of mode `pad`: channel means (0 to 1) as 8-bit values, rounded down."""
    red, green, blue = (int(value * 255) for value in image_mean)
    return red, green, blue


def fit_image(
    image: Image.Image, mode: str, *, size: int | tuple[int, int], fill: Sequence[int], shift: int = 0
) -> Image.Image:
    """Return the image in the shape of an image mode, before the image processor is applied.

    Args:
        image: any image; it is converted to RGB first.
        mode: `square` leaves the shape to the processor (shortest edge, center crop); `pad` centers the image on a
            square of color `fill`, with offsets rounded down; `resize` resizes it to `size` (bicubic) without keeping
            the aspect ratio, so nothing is cropped; `keep` scales it and keeps the aspect ratio.
        size: side, or (height, width), of the model's input in pixels.
        fill: red, green, blue of the border that `pad` adds.
        shift: offset from the center, in pixels, that `pad` adds; LLaVA-Med 1.5 draws it at random.

    Raises:
        ConfigError: the mode is unknown, or it is `anyres`, for which use `tiles`.
        DataError: the result would have more than `MAX_PIXELS`.
    """
    image = to_rgb(image)
    if mode == "square":
        return image
    if mode == "pad":
        return _pad(image, (int(fill[0]), int(fill[1]), int(fill[2])), shift)
    if mode == "resize":
        height, width = (size, size) if isinstance(size, int) else size
        return resize_image(image, (width, height), Image.Resampling.BICUBIC)
    if mode == "keep":
        return image.resize(keep_size(image.size), Image.Resampling.BICUBIC)
    if mode == "anyres":
        raise ConfigError("image mode anyres splits an image into tiles; use `tiles`")
    raise ConfigError(f"unknown image mode {mode!r}; known: {', '.join(IMAGE_MODES)}")


def anyres_tiles(image: Image.Image, whole: Size, side: int) -> list[Image.Image]:
    """Return an image as the tiles of image mode `anyres`, each `side` x `side` pixels.

    Args:
        image: any image; it is converted to RGB first.
        whole: width and height of all tiles together; the image is scaled and centered in them, on black.
        side: side of a tile in pixels.

    Returns:
        The whole image resized to one tile, then the tiles row by row.
    """
    image = to_rgb(image)
    scaled, corner = fit_centered(image.size, whole)
    canvas = Image.new("RGB", whole, (0, 0, 0))
    canvas.paste(image.resize(scaled, Image.Resampling.BICUBIC), corner)
    corners = [(left, top) for top in range(0, whole[1], side) for left in range(0, whole[0], side)]
    parts = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
    return [_squashed(image, side), *parts]


def _squashed(image: Image.Image, side: int) -> Image.Image:
    """Return the image resized to a square, in the order of directions recorded from the original."""
    # Pillow releases differ in the order of the two directions, and intermediate values are rounded to 8 bits. The
    # original shrinks one direction before it enlarges the other.
    if image.height > side > image.width:
        image = image.resize((image.width, side), Image.Resampling.BICUBIC)
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _pad(image: Image.Image, fill: tuple[int, int, int], shift: int) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    check_made((side, side), image.size)
    square = Image.new("RGB", (side, side), fill)
    along = (width < height, height < width)  # only the short side has a border to move in
    square.paste(image, ((side - width) // 2 + shift * along[0], (side - height) // 2 + shift * along[1]))
    return square
