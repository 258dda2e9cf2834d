"""DICOM files as images: the one way from their bytes to RGB, the same for training, evaluation and chat.

    bytes --header--> Layout --decoder--> stored values --rescale, window--> gray --+
                                          palette, color --to 8 bits--> RGB -------+--> square pixels --> L or RGB

Rules, beside the two choices of `DicomPolicy`:

- Gray: rescale slope and intercept or the Modality LUT, then the VOI LUT or window of the policy, then 0 to 255.
  MONOCHROME1 is inverted. A file without a window is shown from the smallest to the largest value that is not padding,
  one of at most 8 bits over its whole range, as PNG files are.
- Color: palettes, RGB and the YBR spaces become RGB; more than 8 bits are scaled by the bits stored.
- Overlays, annotations, color profiles and supplemental palettes are not shown.
- Pixels that are not square are made square by enlarging the image in one direction.
- Size is checked before anything is decoded, against the header and against the compressed data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels.processing import apply_color_lut

from llava.errors import DataError, MissingDependency, NotAPicture
from llava.imaging import grayscale as windows
from llava.imaging.dicom.header import PICTURE_TAGS, items, number, numbers, quiet, read, word
from llava.imaging.dicom.pixels import Layout, Stored, frame_values, padding_of
from llava.imaging.dicom.policy import PRESETS, DicomPolicy
from llava.imaging.dicom.sop_classes import check_picture
from llava.imaging.grayscale import Table, Values, levels_of

SQUARE_ENOUGH = 0.01
"""Pixels whose sides differ by less than this share are taken as square."""

MAX_ASPECT = 20.0
"""Longer pixels than this are a mistake in the file, and taken as square."""

_Gray = NDArray[np.uint8]


def picture(data: bytes, policy: DicomPolicy, *, name: str, max_pixels: int) -> Image.Image:
    """Return a DICOM file as an image: mode L if it is gray, else RGB.

    Args:
        data: the file's bytes.
        policy: window and frame.
        name: how messages call the file.
        max_pixels: largest size of a frame.

    Raises:
        NotAPicture: the file holds a dose, a plan, a report, a waveform or the like; says what.
        DataError: damaged, cut off, too large, or beyond what is decoded.
        MissingDependency: the decoder of its compression is not installed.
    """
    dataset = read(data, PICTURE_TAGS, name=name, pixels=True)
    try:
        check_picture(dataset)
        layout = Layout.of(dataset, max_pixels=max_pixels)
        index = policy.frame_of(layout.num_frames)
        if index is None:
            raise DataError(f"has {layout.num_frames} frames, so there is no frame {policy.frame} (they count from 0)")
        stored, color = frame_values(dataset, layout, index)
        if color.startswith("MONOCHROME"):
            shown: _Gray = _gray(dataset, stored, layout, index, policy)
        elif color == "PALETTE COLOR":
            shown = _from_palette(dataset, stored)
        else:
            shown = _from_color(stored, color, layout)
        return _with_square_pixels(Image.fromarray(shown), dataset, index, max_pixels)
    except MissingDependency:
        raise
    except NotAPicture as error:
        raise NotAPicture(f"image {name} {error}") from None
    except DataError as error:
        raise DataError(f"image {name} {error}") from None


def _groups(dataset: FileDataset, index: int) -> list[Dataset]:
    """Return where a field of this frame may stand, the most special place first: its groups, shared ones, the file."""
    per_frame = items(dataset, "PerFrameFunctionalGroupsSequence")
    return [*per_frame[index : index + 1], *items(dataset, "SharedFunctionalGroupsSequence")[:1]]


def _place(dataset: FileDataset, index: int, group: str, keyword: str) -> Dataset:
    """Return the data set that holds `keyword` for this frame: an item of functional group `group`, or the file."""
    for groups in _groups(dataset, index):
        for item in items(groups, group):
            if keyword in item:
                return item
    return dataset


def _gray(dataset: FileDataset, stored: Stored, layout: Layout, index: int, policy: DicomPolicy) -> _Gray:
    """Return a monochrome frame as gray levels."""
    padding = padding_of(dataset, stored, layout)
    found = levels_of(stored) if padding is None and policy.percentiles is None else None
    if found is None:
        return _shown(dataset, stored, layout, index, policy, padding=padding)
    # All the rest looks at one value at a time, and at the smallest and the largest.
    gray = _shown(dataset, found.values, layout, index, policy, padding=None)
    shown: _Gray = np.take(gray, found.places, mode="clip")
    return shown


def _shown(
    dataset: FileDataset,
    stored: Stored,
    layout: Layout,
    index: int,
    policy: DicomPolicy,
    *,
    padding: NDArray[np.bool_] | None,
) -> _Gray:
    """Return stored monochrome values, of any shape, as gray levels."""
    values = stored.astype(np.float64)
    lut = next(iter(items(dataset, "ModalityLUTSequence")), None)
    if lut is not None:
        modality = _table(dataset, lut, is_signed=layout.is_signed)
        values = modality(values)
        layout_range = (0.0, float(2**modality.bits - 1))
    else:
        place = _place(dataset, index, "PixelValueTransformationSequence", "RescaleSlope")
        slope, intercept = number(place, "RescaleSlope"), number(place, "RescaleIntercept")
        values = windows.rescale(values, slope, intercept)
        low = -(2 ** (layout.bits - 1)) if layout.is_signed else 0
        ends = windows.rescale(np.array([low, low + 2**layout.bits - 1], dtype=np.float64), slope, intercept)
        layout_range = (float(ends.min()), float(ends.max()))
    if not np.isfinite(values).all():
        raise DataError("holds values that are not finite")
    shares = _window(dataset, values, padding, index, policy)
    if shares is None:
        whole_range = layout.bits <= 8 and not layout.is_float
        low_high = layout_range if whole_range else windows.limits(values, padding, (0.0, 100.0))
        shares = windows.spread(values, *low_high)
    return windows.to_gray(shares, inverted=layout.color == "MONOCHROME1")


def _window(
    dataset: FileDataset, values: Values, padding: NDArray[np.bool_] | None, index: int, policy: DicomPolicy
) -> Values | None:
    """Return 0 to 1 by the policy's window, or None where policy and file leave it open."""
    if policy.window == "full" or policy.percentiles is not None:
        return windows.spread(values, *windows.limits(values, padding, policy.percentiles or (0.0, 100.0)))
    if policy.fixed is not None:
        return windows.windowed(values, *policy.fixed)
    if policy.window in PRESETS and word(dataset, "Modality") == "CT":
        return windows.windowed(values, *PRESETS[policy.window])
    lut = next(iter(items(dataset, "VOILUTSequence")), None)
    if lut is not None:
        voi = _table(dataset, lut, is_signed=bool((values < 0).any()))
        return np.clip(voi(values) / (2.0**voi.bits - 1.0), 0.0, 1.0)
    place = _place(dataset, index, "FrameVOILUTSequence", "WindowCenter")
    center, width = number(place, "WindowCenter"), number(place, "WindowWidth")
    if center is None or width is None or width <= 0:
        return None
    return windows.windowed(values, center, width, word(place, "VOILUTFunction"))


def _table(dataset: FileDataset, item: Dataset, *, is_signed: bool) -> Table:
    """Return the lookup table of a sequence item."""
    length, first, bits = (*numbers(item, "LUTDescriptor"), 0, 0, 0)[:3]
    if not 1 <= bits <= 16:
        raise DataError("has a lookup table whose depth is not 1 to 16 bits")
    if first >= 32768 and is_signed:
        first -= 65536
    return Table(int(first), _entries(dataset, item, "LUTData", int(length)), int(bits))


def _entries(dataset: FileDataset, place: Dataset, keyword: str, length: int) -> Values:
    """Return the entries of a table, `[N]`, whichever way they are packed; a `length` of 0 means 65536."""
    num_entries = length % 65536 or 65536
    with quiet("has a lookup table that cannot be read"):
        raw = place[keyword].value
        if isinstance(raw, bytes):
            order = "<" if dataset.original_encoding[1] else ">"
            found = np.frombuffer(raw, dtype="u1" if len(raw) < 2 * num_entries else f"{order}u2")
        else:
            found = np.atleast_1d(np.asarray(raw, dtype=np.int64) % 65536)
    if len(found) < num_entries:
        raise DataError(f"has a lookup table of {len(found)} entries that promises {num_entries}")
    return found[:num_entries].astype(np.float64)


def _from_palette(dataset: FileDataset, stored: Stored) -> _Gray:
    """Return a palette frame as `[H, W, 3]`."""
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        with quiet("has a palette that cannot be applied"):
            colors = np.asarray(apply_color_lut(stored, dataset))
            return (colors if colors.dtype == np.uint8 else colors >> 8).astype(np.uint8)
    tables = []
    for color in ("Red", "Green", "Blue"):
        length, first, bits = (*numbers(dataset, f"{color}PaletteColorLookupTableDescriptor"), 0, 0, 0)[:3]
        entries = _entries(dataset, dataset, f"{color}PaletteColorLookupTableData", int(length))
        tables.append(Table(int(first), entries, int(bits)))
    # Some writers state 16 bits and store 8 in the low halves: no entry of any color reaches 256.
    is_narrow = max(float(table.entries.max()) for table in tables) < 256
    values = stored.astype(np.float64)
    channels = [table(values) if is_narrow else np.floor(table(values) / 256.0) for table in tables]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _from_color(stored: Stored, color: str, layout: Layout) -> _Gray:
    """Return a color frame as 8-bit `[H, W, 3]`."""
    if color != "RGB" or layout.samples != 3:
        raise DataError("is in a color space that is not known; expected MONOCHROME, PALETTE COLOR, RGB or YBR")
    if layout.is_signed or layout.is_float:
        raise DataError("has colors that may be negative or fractions; expected whole numbers from 0")
    if stored.dtype == np.uint8 and layout.bits == 8:
        return stored
    return windows.to_gray(np.clip(stored / (2.0**layout.bits - 1.0), 0.0, 1.0), inverted=False)


def _with_square_pixels(image: Image.Image, dataset: FileDataset, index: int, max_pixels: int) -> Image.Image:
    """Return the image enlarged in one direction, where its pixels are longer in that one."""
    ratio = _aspect(dataset, index)
    if not 1.0 / MAX_ASPECT <= ratio <= MAX_ASPECT or abs(ratio - 1.0) < SQUARE_ENOUGH:
        return image
    width, height = image.size
    size = (width, round(height * ratio)) if ratio > 1.0 else (round(width / ratio), height)
    if size[0] * size[1] > max_pixels:
        raise DataError(f"has {size[0]} x {size[1]} pixels once they are square, more than {max_pixels}")
    return image.resize(size, Image.Resampling.BICUBIC)


def _aspect(dataset: FileDataset, index: int) -> float:
    """Return height over width of one pixel; 1 where the file does not say."""
    measures = _place(dataset, index, "PixelMeasuresSequence", "PixelSpacing")
    for place, keyword in (
        (dataset, "PixelAspectRatio"),
        (measures, "PixelSpacing"),
        (dataset, "ImagerPixelSpacing"),
        (dataset, "NominalScannedPixelSpacing"),
    ):
        sides = numbers(place, keyword)
        if len(sides) >= 2 and sides[0] > 0 and sides[1] > 0:
            return sides[0] / sides[1]
    return 1.0
