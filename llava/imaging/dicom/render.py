"""Render DICOM files as 8-bit images, identically for training, evaluation and chat.

    bytes --header--> PixelFormat --decoder--> stored values --rescale, window--> gray --+
                                               palette, color --to 8 bits--> RGB --------+--> square pixels --> L or RGB

Rules in addition to the two choices of `DicomPolicy`:

- Gray: rescale slope and intercept or the Modality LUT, then the VOI LUT or window of the policy, then 0 to 255.
  MONOCHROME1 is inverted. Without a window, the smallest to the largest value that is not padding is shown; files of
  at most 8 bits are shown over their whole range, as PNG files are.
- Color: palettes, RGB and the YBR spaces become RGB; more than 8 bits are scaled by the bits stored.
- Overlays, annotations, color profiles and supplemental palettes are not shown.
- Pixels that are not square are made square by enlarging the image in one direction.
- The size is checked before decoding, in the header and in the compressed data.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels.processing import apply_color_lut, apply_rescale

from llava.errors import DataError, MissingDependency, NotAnImageError
from llava.imaging import grayscale
from llava.imaging.dicom.header import (
    IMAGE_TAGS,
    code_value,
    number_value,
    number_values,
    read_header,
    sequence_items,
    suppress_pydicom_output,
)
from llava.imaging.dicom.pixels import PixelFormat, Stored, frame_values, padding_of
from llava.imaging.dicom.policy import PRESETS, DicomPolicy
from llava.imaging.dicom.sop_classes import check_image_object
from llava.imaging.grayscale import LookupTable, Values, levels_of

SQUARE_ENOUGH = 0.01
"""Pixels are treated as square if the ratio of their sides differs from 1 by less than this."""

MAX_ASPECT = 20.0
"""A larger aspect ratio is treated as an error in the file, and the pixels as square."""

_Pixels = NDArray[np.uint8]


def render_frame(data: bytes, policy: DicomPolicy, *, name: str, max_pixels: int) -> Image.Image:
    """Return one frame of a DICOM file as an image: mode L if it is gray, else RGB.

    Args:
        data: bytes of the file.
        policy: window and frame.
        name: name of the file in messages.
        max_pixels: largest number of pixels of a frame.

    Raises:
        NotAnImageError: the file holds another object, such as a dose, a report or a waveform; the message says which.
        DataError: the file is damaged, truncated, too large, or in a form that is not decoded.
        MissingDependency: the decoder of its compression is not installed.
    """
    return next(_rendered(data, policy, name, max_pixels, all_frames=False))


def render_frames(data: bytes, policy: DicomPolicy, *, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Yield all frames of a DICOM file as images; arguments and errors are those of `render_frame`."""
    return _rendered(data, policy, name, max_pixels, all_frames=True)


def _rendered(
    data: bytes, policy: DicomPolicy, name: str, max_pixels: int, *, all_frames: bool
) -> Iterator[Image.Image]:
    dataset = read_header(data, IMAGE_TAGS, name=name, pixels=True)
    try:
        check_image_object(dataset)
        pixel_format = PixelFormat.of(dataset, max_pixels=max_pixels)
        index = policy.frame_of(pixel_format.num_frames)
        if index is None:
            raise DataError(
                f"has {pixel_format.num_frames} frames, counted from 0; frame {policy.frame} of --dicom-frame does not "
                "exist"
            )
        for number in range(pixel_format.num_frames) if all_frames else [index]:
            yield _image_of(dataset, pixel_format, number, policy, max_pixels)
    except MissingDependency:
        raise
    except NotAnImageError as error:
        raise NotAnImageError(f"image {name} {error}") from None
    except DataError as error:
        raise DataError(f"image {name} {error}") from None


def _image_of(
    dataset: FileDataset, pixel_format: PixelFormat, index: int, policy: DicomPolicy, max_pixels: int
) -> Image.Image:
    """Return one frame as an image."""
    stored, color = frame_values(dataset, pixel_format, index)
    if color.startswith("MONOCHROME"):
        shown: _Pixels = _gray(dataset, stored, pixel_format, index, policy)
    elif color == "PALETTE COLOR":
        shown = _from_palette(dataset, stored, pixel_format)
    else:
        shown = _from_color(stored, color, pixel_format)
    return _with_square_pixels(Image.fromarray(shown), dataset, index, max_pixels)


def _groups(dataset: FileDataset, index: int) -> list[Dataset]:
    """Return the functional groups of a frame, then the shared ones."""
    per_frame = sequence_items(dataset, "PerFrameFunctionalGroupsSequence")
    return [*per_frame[index : index + 1], *sequence_items(dataset, "SharedFunctionalGroupsSequence")[:1]]


def _dataset_with(dataset: FileDataset, index: int, group: str, keyword: str) -> Dataset:
    """Return the data set with `keyword` for a frame: an item of functional group `group`, or the file."""
    for groups in _groups(dataset, index):
        for item in sequence_items(groups, group):
            if keyword in item:
                return item
    return dataset


def _gray(dataset: FileDataset, stored: Stored, pixel_format: PixelFormat, index: int, policy: DicomPolicy) -> _Pixels:
    """Return a monochrome frame as gray levels."""
    padding = padding_of(dataset, stored, pixel_format)
    found = levels_of(stored) if padding is None and policy.percentiles is None else None
    if found is None:
        return _gray_levels(dataset, stored, pixel_format, index, policy, padding=padding)
    # Later steps depend on single values and on the extremes only, so distinct levels are computed once each.
    gray = _gray_levels(dataset, found.values, pixel_format, index, policy, padding=None)
    shown: _Pixels = np.take(gray, found.places, mode="clip")
    return shown


def _gray_levels(
    dataset: FileDataset,
    stored: Stored,
    pixel_format: PixelFormat,
    index: int,
    policy: DicomPolicy,
    *,
    padding: NDArray[np.bool_] | None,
) -> _Pixels:
    """Return stored monochrome values, of any shape, as gray levels."""
    values, possible = _physical_values(dataset, stored.astype(np.float64), pixel_format, index)
    if not np.isfinite(values).all():
        raise DataError("holds values that are not finite")
    shares = _window(dataset, values, padding, index, policy, possible=possible)
    if shares is None:
        whole_range = pixel_format.bits <= 8 and not pixel_format.is_float
        low_high = possible if whole_range else grayscale.percentile_limits(values, padding, (0.0, 100.0))
        shares = grayscale.stretch_values(values, *low_high)
    return grayscale.to_gray(shares, inverted=pixel_format.color == "MONOCHROME1")


def _physical_values(
    dataset: FileDataset, values: Values, pixel_format: PixelFormat, index: int
) -> tuple[Values, tuple[float, float]]:
    """Return stored values after the Modality LUT or rescaling, and the range that these can have at all."""
    low = -(2.0 ** (pixel_format.bits - 1)) if pixel_format.is_signed else 0.0
    ends = np.array([low, low + 2.0**pixel_format.bits - 1])
    if pixel_format.is_float:
        ends = np.array([-np.inf, np.inf])
    lut = next(iter(sequence_items(dataset, "ModalityLUTSequence")), None)
    if lut is not None:
        modality = _table(dataset, lut, low=float(ends[0]), high=float(ends[1]))
        return modality(values), (0.0, float(2**modality.bits - 1))
    place = _dataset_with(dataset, index, "PixelValueTransformationSequence", "RescaleSlope")
    slope, intercept = number_value(place, "RescaleSlope"), number_value(place, "RescaleIntercept")
    # pydicom rescales only if both fields are there; a missing slope is 1, a missing intercept 0.
    both = Dataset()
    both.add_new("RescaleSlope", "FD", 1.0 if slope is None else slope)
    both.add_new("RescaleIntercept", "FD", intercept or 0.0)
    ends = apply_rescale(ends, both)
    return apply_rescale(values, both), (float(ends.min()), float(ends.max()))


def _window(
    dataset: FileDataset,
    values: Values,
    padding: NDArray[np.bool_] | None,
    index: int,
    policy: DicomPolicy,
    *,
    possible: tuple[float, float],
) -> Values | None:
    """Return values windowed to 0 to 1, or None where neither the policy nor the file gives a window.

    Args:
        dataset: fields of the file.
        values: values after the Modality LUT or rescaling.
        padding: mask of padding.
        index: number of the frame.
        policy: window.
        possible: smallest and largest value that the file can have.
    """
    if policy.window == "full" or policy.percentiles is not None:
        return grayscale.stretch_values(
            values, *grayscale.percentile_limits(values, padding, policy.percentiles or (0.0, 100.0))
        )
    if policy.fixed is not None:
        return grayscale.window_values(values, *policy.fixed)
    if policy.window in PRESETS and code_value(dataset, "Modality") == "CT":
        return grayscale.window_values(values, *PRESETS[policy.window])
    lut = next(iter(sequence_items(dataset, "VOILUTSequence")), None)
    if lut is not None:
        voi = _table(dataset, lut, low=possible[0], high=possible[1])
        return np.clip(voi(values) / (2.0**voi.bits - 1.0), 0.0, 1.0)
    place = _dataset_with(dataset, index, "FrameVOILUTSequence", "WindowCenter")
    center, width = number_value(place, "WindowCenter"), number_value(place, "WindowWidth")
    if center is None or width is None or width <= 0:
        return None
    return grayscale.window_values(values, center, width, code_value(place, "VOILUTFunction"))


def _table(dataset: FileDataset, item: Dataset, *, low: float, high: float) -> LookupTable:
    """Return the lookup table of a sequence item, for values that can be `low` to `high`."""
    length, first, bits = (*number_values(item, "LUTDescriptor"), 0, 0, 0)[:3]
    if not 1 <= bits <= 16:
        raise DataError("has a lookup table with an invalid number of bits; expected 1 to 16")
    entries = _entries(dataset, item, "LUTData", int(length))
    return LookupTable(_first_value(int(first), low, high), entries, int(bits))


def _first_value(first: int, low: float, high: float) -> int:
    """Return the first value of a lookup table, which may be stored with the wrong sign (64512 for -1024).

    The values that are possible decide, never those of one image: all images of a series must look alike.
    """
    if first >= 32768 and low < 0:
        return first - 65536
    return first + 65536 if first < 0 <= low and first + 65536 <= high else first


def _entries(dataset: FileDataset, place: Dataset, keyword: str, length: int) -> Values:
    """Return the entries `[N]` of a table in either packing; a `length` of 0 means 65536."""
    num_entries = length % 65536 or 65536
    with suppress_pydicom_output("has a lookup table that cannot be read"):
        raw = place[keyword].value
        if isinstance(raw, bytes):
            order = "<" if dataset.original_encoding[1] else ">"
            found = np.frombuffer(raw, dtype="u1" if len(raw) < 2 * num_entries else f"{order}u2")
        else:
            found = np.atleast_1d(np.asarray(raw, dtype=np.int64) % 65536)
    if len(found) < num_entries:
        raise DataError(f"has a lookup table of {len(found)} entries; its descriptor states {num_entries}")
    return found[:num_entries].astype(np.float64)


def _from_palette(dataset: FileDataset, stored: Stored, pixel_format: PixelFormat) -> _Pixels:
    """Return a palette frame as `[H, W, 3]`."""
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        with suppress_pydicom_output("has a palette that cannot be applied"):
            colors = np.asarray(apply_color_lut(stored, dataset))
            return (colors if colors.dtype == np.uint8 else colors >> 8).astype(np.uint8)
    tables = []
    for color in ("Red", "Green", "Blue"):
        length, first, bits = (*number_values(dataset, f"{color}PaletteColorLookupTableDescriptor"), 0, 0, 0)[:3]
        entries = _entries(dataset, dataset, f"{color}PaletteColorLookupTableData", int(length))
        low = -(2.0 ** (pixel_format.bits - 1)) if pixel_format.is_signed else 0.0
        first = _first_value(int(first), low, low + 2.0**pixel_format.bits - 1)
        tables.append(LookupTable(first, entries, int(bits)))
    # Some writers state 16 bits and store 8 in the low bytes: no entry of any color reaches 256.
    is_narrow = max(float(table.entries.max()) for table in tables) < 256
    values = stored.astype(np.float64)
    channels = [table(values) if is_narrow else np.floor(table(values) / 256.0) for table in tables]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _from_color(stored: Stored, color: str, pixel_format: PixelFormat) -> _Pixels:
    """Return a color frame as 8-bit `[H, W, 3]`."""
    if color != "RGB" or pixel_format.samples != 3:
        raise DataError("is in an unknown color space; expected MONOCHROME, PALETTE COLOR, RGB or YBR")
    if pixel_format.is_signed or pixel_format.is_float:
        raise DataError("has signed or floating-point colors; expected unsigned integers")
    if stored.dtype == np.uint8 and pixel_format.bits == 8:
        return stored
    return grayscale.to_gray(np.clip(stored / (2.0**pixel_format.bits - 1.0), 0.0, 1.0), inverted=False)


def _with_square_pixels(image: Image.Image, dataset: FileDataset, index: int, max_pixels: int) -> Image.Image:
    """Return the image enlarged in the direction in which its pixels are longer."""
    ratio = _aspect(dataset, index)
    if not 1.0 / MAX_ASPECT <= ratio <= MAX_ASPECT or abs(ratio - 1.0) < SQUARE_ENOUGH:
        return image
    width, height = image.size
    size = (width, round(height * ratio)) if ratio > 1.0 else (round(width / ratio), height)
    if size[0] * size[1] > max_pixels:
        raise DataError(f"has {size[0]} x {size[1]} square pixels, more than the limit of {max_pixels}")
    return image.resize(size, Image.Resampling.BICUBIC)


def _aspect(dataset: FileDataset, index: int) -> float:
    """Return the height of a pixel divided by its width; 1 if the file does not state it."""
    measures = _dataset_with(dataset, index, "PixelMeasuresSequence", "PixelSpacing")
    for place, keyword in (
        (dataset, "PixelAspectRatio"),
        (measures, "PixelSpacing"),
        (dataset, "ImagerPixelSpacing"),
        (dataset, "NominalScannedPixelSpacing"),
    ):
        sides = number_values(place, keyword)
        if len(sides) >= 2 and sides[0] > 0 and sides[1] > 0:
            return sides[0] / sides[1]
    return 1.0
