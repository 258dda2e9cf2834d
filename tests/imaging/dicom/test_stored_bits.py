"""Where the stored bits lie, which values tables begin with, and DICOM files that lack usual fields."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels.processing import apply_rescale, apply_voi, apply_windowing

from llava.errors import DataError
from llava.imaging import decode, grayscale
from tests.support.dicom_files import lookup_table, make, make_dataset, to_bytes

SYNTAXES = {
    "explicit": uid.ExplicitVRLittleEndian,
    "implicit": uid.ImplicitVRLittleEndian,
    "big-endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
}


def gray(data: bytes) -> NDArray[Any]:
    return np.asarray(decode.load_image(data))[:, :, 0].astype(int)


def file_of(values: NDArray[Any], syntax: str = "explicit", **fields: Any) -> bytes:
    """Return a file in a transfer syntax, whose values have its byte order."""
    if syntax == "big-endian":
        dataset = make_dataset(values, TransferSyntaxUID=SYNTAXES[syntax], **fields)
        dataset.PixelData = values.astype(values.dtype.newbyteorder(">")).tobytes()
        plain, stream = Dataset(dataset), io.BytesIO()
        plain.file_meta = dataset.file_meta
        pydicom.dcmwrite(stream, plain, enforce_file_format=True)
        return stream.getvalue()
    return make(values, TransferSyntaxUID=SYNTAXES[syntax], **fields)


AS_STORED = {"WindowCenter": "127.5", "WindowWidth": "255", "VOILUTFunction": "LINEAR_EXACT"}
"""Window that shows values 0 to 255 as these levels."""


def stored(bits: int, *, signed: bool) -> NDArray[np.int64]:
    low = -(1 << bits - 1) if signed else 0
    return np.linspace(low, low + (1 << bits) - 1, 64).astype(np.int64).reshape(8, 8)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("allocated", "bits", "high", "syntax"),
    [
        (16, 12, 15, "explicit"),
        (16, 12, 13, "implicit"),
        (16, 10, 15, "big-endian"),
        (16, 14, 15, "deflated"),
        (16, 8, 15, "explicit"),
        (8, 6, 7, "explicit"),
        (8, 7, 7, "implicit"),
        (32, 20, 31, "explicit"),
    ],
)
def test_left_justified_values_look_like_right_justified_ones(
    allocated: int, bits: int, high: int, syntax: str, signed: bool
) -> None:
    values = stored(bits, signed=signed)
    kind = f"{'i' if signed else 'u'}{allocated // 8}"
    window = {"WindowCenter": 3, "WindowWidth": 1 << bits}
    right = file_of(values.astype(kind), syntax, BitsStored=bits, **window)
    noise = (1 << high - bits + 1) - 1  # bits below the stored ones are not shown
    left = file_of(((values << high - bits + 1) | noise).astype(kind), syntax, BitsStored=bits, HighBit=high, **window)
    assert np.array_equal(gray(left), gray(right)) and np.ptp(gray(left)) > 100


def test_left_justified_run_length_encoding_and_color() -> None:
    values = stored(12, signed=False).astype(np.uint16)
    dataset = make_dataset(values << 4, BitsStored=12, HighBit=15)
    dataset.compress(uid.RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    assert np.array_equal(gray(to_bytes(dataset)), gray(make(values, BitsStored=12)))
    color = np.stack([values, values[::-1], values.T], axis=-1)
    left = decode.load_image(make(color << 4, BitsStored=12, HighBit=15))
    assert left.tobytes() == decode.load_image(make(color, BitsStored=12)).tobytes()


@pytest.mark.parametrize("high", [0, 7, 10, 16, 31])
def test_a_high_bit_that_does_not_fit_is_refused_by_name(high: int) -> None:
    with pytest.raises(DataError, match=f"states HighBit {high} with 12 bits stored in 16; expected 11"):
        gray(make(stored(12, signed=False).astype(np.uint16), BitsStored=12, HighBit=high))


CASES = [
    ("u2", 12, "-1024", -1024),
    ("u2", 16, "-1024", -1024),
    ("i2", 12, "0", -1000),
    ("i2", 16, "0", -2000),
    ("i2", 16, "-1024", -3024),
    ("u1", 8, "-200", -200),
]


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(("kind", "bits", "intercept", "first"), CASES)
def test_a_voi_table_that_begins_below_zero(kind: str, bits: int, intercept: str, first: int, syntax: str) -> None:
    entries = np.arange(0, 4096, 2, dtype=np.uint16)
    order = ">" if syntax == "big-endian" else "<"
    for start in (0, 60, 120):  # images of one series: without and with values below zero
        values = (start + np.arange(64).reshape(8, 8)).astype(kind)
        for kind_of_first in ("US", "SS"):
            item = Dataset()
            stated = first % 65536 if kind_of_first == "US" else first
            item.add_new("LUTDescriptor", kind_of_first, [len(entries), stated, 12])
            item.add_new("LUTData", "OW", entries.astype(f"{order}u2").tobytes())
            fields = {"BitsStored": bits, "RescaleIntercept": intercept, "RescaleSlope": "1", "VOILUTSequence": [item]}
            places = np.clip(values.astype(int) + int(intercept) - first, 0, len(entries) - 1)
            expected = np.rint(entries[places] / 4095 * 255).astype(int)
            assert np.array_equal(gray(file_of(values, syntax, **fields)), expected), (start, kind_of_first)


def test_tables_that_begin_in_the_upper_half_stay_unsigned() -> None:
    values = np.arange(40000, 40064, dtype=np.uint16).reshape(8, 8)
    table = lookup_table(40000, np.arange(64) * 4, 8)
    assert np.array_equal(gray(make(values, VOILUTSequence=[table])).ravel(), np.arange(64) * 4)
    assert np.array_equal(gray(make(values, ModalityLUTSequence=[table], **AS_STORED)).ravel(), np.arange(64) * 4)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("low", [0, -32])
def test_a_modality_table_that_begins_below_zero(low: int, syntax: str) -> None:
    values = (low + np.arange(64).reshape(8, 8)).astype(np.int16)
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [256, 65536 - 100, 8])
    order = ">" if syntax == "big-endian" else "<"
    item.add_new("LUTData", "OW", np.arange(256).astype(f"{order}u2").tobytes())
    found = gray(file_of(values, syntax, ModalityLUTSequence=[item], **AS_STORED))
    assert np.array_equal(found, values.astype(int) + 100)


@pytest.mark.parametrize("kind", ["US", "SS"])
def test_a_palette_that_begins_below_zero(kind: str) -> None:
    values, first = np.array([[-2, -1], [0, 1]], np.int8), -2
    tables: dict[str, Any] = {}
    for color, entries in {"Red": [0, 10, 20, 255], "Green": [9, 9, 9, 9], "Blue": [255, 0, 0, 1]}.items():
        tables[f"{color}PaletteColorLookupTableDescriptor"] = [4, first % 65536 if kind == "US" else first, 16]
        tables[f"{color}PaletteColorLookupTableData"] = np.array(entries, "<u2").tobytes()
    dataset = make_dataset(values, PhotometricInterpretation="PALETTE COLOR", **tables)
    for color in ("Red", "Green", "Blue"):
        dataset[f"{color}PaletteColorLookupTableDescriptor"].VR = kind
    image = decode.load_image(to_bytes(dataset))
    assert np.asarray(image).reshape(-1, 3).tolist() == [[0, 9, 255], [10, 9, 0], [20, 9, 0], [255, 9, 1]]


def without(dataset: FileDataset, *keywords: str) -> bytes:
    for keyword in keywords:
        del dataset[keyword]
    return to_bytes(dataset)


GRAY = stored(12, signed=False).astype(np.uint16)
COLOR = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("values", "keywords"),
    [
        (GRAY, ["PhotometricInterpretation"]),
        (GRAY, ["BitsAllocated"]),
        (GRAY, ["SamplesPerPixel"]),
        (GRAY, ["HighBit", "PixelRepresentation"]),
        (GRAY, ["PhotometricInterpretation", "SamplesPerPixel", "BitsAllocated", "HighBit", "PixelRepresentation"]),
        ((GRAY // 16).astype(np.uint8)[:5, :7], ["BitsAllocated", "BitsStored", "HighBit"]),
        (COLOR, ["PlanarConfiguration"]),
        (COLOR, ["PhotometricInterpretation"]),
        (COLOR, ["SamplesPerPixel"]),
        (COLOR, ["PlanarConfiguration", "PhotometricInterpretation", "BitsAllocated", "BitsStored"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_fields_with_one_sensible_value_may_be_missing(values: NDArray[Any], keywords: list[str], syntax: str) -> None:
    def dataset() -> FileDataset:
        made = make_dataset(values, BitsStored=12 if values is GRAY else values.dtype.itemsize * 8)
        if syntax == uid.RLELossless:
            made.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
        return made

    if syntax == uid.RLELossless and {"BitsAllocated", "BitsStored"} <= set(keywords):
        with pytest.raises(DataError, match=r"lacks field (BitsStored|PhotometricInterpretation)"):
            gray(without(dataset(), *keywords))
    elif syntax == uid.RLELossless and values is COLOR and "PhotometricInterpretation" in keywords:
        with pytest.raises(DataError, match="lacks field PhotometricInterpretation"):
            gray(without(dataset(), *keywords))
    else:
        whole = decode.load_image(to_bytes(dataset()))
        assert decode.load_image(without(dataset(), *keywords)).tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("keyword", "change"),
    [
        ("Rows", {}),
        ("Columns", {}),
        ("BitsAllocated", {"PixelData": b"\0" * 130}),
        ("PhotometricInterpretation", {"RedPaletteColorLookupTableDescriptor": [4, 0, 16]}),
    ],
)
def test_a_missing_field_that_is_needed_is_named(keyword: str, change: dict[str, Any]) -> None:
    dataset = make_dataset(GRAY, BitsStored=12)
    for name, value in change.items():
        setattr(dataset, name, value)
    with pytest.raises(DataError, match=f"lacks field {keyword}"):
        gray(without(dataset, keyword))


def test_the_bits_of_32_bit_values_may_be_missing() -> None:
    values = GRAY.astype(np.uint32) << 8
    whole = gray(make(values))
    assert np.array_equal(gray(without(make_dataset(values), "BitsAllocated")), whole) and np.ptp(whole) == 255


def test_why_windows_are_not_computed_by_pydicom() -> None:
    """Levels at a half round otherwise there, so results would not stay equal."""
    rng, num_different = np.random.default_rng(0), 0
    for _ in range(500):
        dataset = Dataset()
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
        dataset.BitsStored = bits = int(rng.integers(8, 13))
        dataset.RescaleSlope, dataset.RescaleIntercept = float(rng.choice([1, 0.5, 2])), -1024
        dataset.VOILUTFunction = function = str(rng.choice(["LINEAR", "LINEAR_EXACT"]))
        dataset.WindowCenter, dataset.WindowWidth = int(rng.integers(0, 1 << bits)), int(rng.integers(2, 1 << bits))
        values = apply_rescale(np.arange(1 << bits), dataset)
        low, high = values[0], values[-1]
        theirs = np.rint((apply_windowing(values, dataset) - low) / (high - low) * 255)
        center, width = float(dataset.WindowCenter), float(dataset.WindowWidth)
        ours = np.rint(grayscale.window_values(values, center, width, function) * 255)
        assert np.abs(theirs - ours).max() <= 1
        num_different += int((theirs != ours).any())
    assert num_different > 0


def test_why_tables_are_not_applied_by_pydicom() -> None:
    """A first value of -1024 that is written as 64512 is taken as it is there."""
    dataset, values = Dataset(), np.arange(64).reshape(8, 8)
    dataset.VOILUTSequence = [lookup_table(64512, np.arange(4096), 12)]
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    assert apply_voi(values, dataset).max() == 0
    shown = gray(make(values.astype(np.int16), BitsStored=12, VOILUTSequence=dataset.VOILUTSequence))
    assert np.array_equal(shown, np.rint((values + 1024) / 4095 * 255))
