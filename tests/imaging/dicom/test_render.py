"""Synthetic DICOM files, one rule each: windows, polarity, depth, palettes, frames, policy."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset

from llava.errors import CheckpointError, ConfigError, DataError
from llava.imaging import decode
from llava.imaging.dicom.policy import PRESETS, DicomPolicy
from llava.model.builder import LoadedModel
from llava.processing import LlavaMedProcessor
from tests.support.dicom_files import RAMP, lookup_table, make, make_dataset, to_bytes


def gray(data: bytes, window: str = "file", frame: str = "first") -> NDArray[Any]:
    """Return the red channel of the image of a file, as integers."""
    image = decode.load_image(data, dicom=DicomPolicy(window, frame))
    assert image.mode == "RGB"
    return np.asarray(image)[:, :, 0].astype(int)


def linear(values: NDArray[Any], center: float, width: float) -> NDArray[Any]:
    """Return gray levels by C.11.2.1.2.1, condition by condition."""
    below, above = values <= center - 0.5 - (width - 1) / 2, values > center - 0.5 + (width - 1) / 2
    inside = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    return np.rint(np.where(below, 0, np.where(above, 255, inside))).astype(int)


def test_the_first_window_after_rescaling() -> None:
    data = make(RAMP, WindowCenter=[40, 500], WindowWidth=[400, 9], RescaleSlope="2", RescaleIntercept="-100")
    assert np.array_equal(gray(data), linear(RAMP * 2.0 - 100, 40, 400))
    inverted = make(RAMP, WindowCenter=40, WindowWidth=400, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(gray(inverted), 255 - linear(RAMP, 40, 400))


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        ("LINEAR_EXACT", lambda x: np.clip((x - 40) / 400 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 40) / 400))),
    ],
)
def test_other_functions(function: str, formula: Any) -> None:
    data = make(RAMP, WindowCenter=40, WindowWidth=400, VOILUTFunction=function)
    assert np.abs(gray(data) - formula(RAMP.astype(float)) * 255).max() <= 0.5 + 1e-9


def test_a_function_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(DataError, match="VOI LUT Function is unknown; expected one of LINEAR"):
        gray(make(RAMP, WindowCenter=40, WindowWidth=400, VOILUTFunction="CUBIC"))


@pytest.mark.parametrize("width", [0, -5, None])
def test_a_window_that_makes_no_sense_counts_as_none(width: int | None) -> None:
    data = make(RAMP, WindowCenter=40, WindowWidth=width)
    assert np.array_equal(gray(data), gray(data, "full"))
    assert gray(data).min() == 0 and gray(data).max() == 255


def test_narrow_windows() -> None:
    step = gray(make(RAMP, WindowCenter=8, WindowWidth=1))
    assert np.array_equal(step, np.where(RAMP > 7.5, 255, 0))
    fraction = gray(make(RAMP, WindowCenter=8, WindowWidth="0.5"))
    assert set(np.unique(fraction)) == {0, 128, 255}


def test_presets_are_for_ct_only() -> None:
    window = {"WindowCenter": 0, "WindowWidth": 100}
    for name, (center, width) in PRESETS.items():
        assert np.array_equal(gray(make(RAMP, Modality="CT", **window), name), linear(RAMP, center, width))
        assert np.array_equal(gray(make(RAMP, Modality="MR", **window), name), linear(RAMP, 0, 100))
    assert np.array_equal(gray(make(RAMP, Modality="MR", **window), "40,400"), linear(RAMP, 40, 400))


def test_padding_never_moves_an_automatic_window() -> None:
    values = RAMP.copy()
    values[0] = -2000
    plain, padded = make(values), make(values, PixelPaddingValue=-2000)
    assert gray(plain)[1].min() > 90
    assert gray(padded)[1].min() == 0 and gray(padded)[0].max() == 0
    assert np.array_equal(gray(padded, "full"), gray(padded))
    ranged = make(values, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-770)
    assert gray(ranged)[1].max() == 0
    only = make(np.full((4, 4), -2000, np.int16), PixelPaddingValue=-2000)
    assert gray(only).max() == 0


def test_percentiles() -> None:
    low, high = np.percentile(RAMP, (10, 90))
    expected = np.rint(np.clip((RAMP - low) / (high - low), 0, 1) * 255)
    assert np.array_equal(gray(make(RAMP), "percentile:10,90"), expected)


@pytest.mark.parametrize(
    ("kind", "bits"), [("u1", 8), ("u1", 6), ("i1", 8), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16)]
)
def test_depths(kind: str, bits: int) -> None:
    low = -(2 ** (bits - 1)) if kind[0] == "i" else 0
    values = np.linspace(low, low + 2**bits - 1, 64).astype(kind).reshape(8, 8)
    expected = np.rint((values.astype(float) - low) / (2**bits - 1) * 255)
    assert np.array_equal(gray(make(values, BitsStored=bits)), expected)


def test_eight_bits_without_a_window_are_not_stretched() -> None:
    assert gray(make(np.full((4, 4), 100, np.uint8))).max() == 100


CODECS = {
    uid.ExplicitVRLittleEndian: "",
    uid.RLELossless: "pydicom",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
}


@pytest.mark.parametrize("syntax", CODECS)
@pytest.mark.parametrize("overlay", [0x1000, 0x8000, 0xF000])
def test_bits_of_overlays_in_unused_bits_are_not_shown(syntax: str, overlay: int) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (40, 40)).astype(np.uint16)
    dataset = make_dataset(values | np.where(values % 3 == 0, overlay, 0).astype(np.uint16))
    if CODECS[syntax]:
        dataset.compress(syntax, encoding_plugin=CODECS[syntax], generate_instance_uid=False)
    dataset.BitsStored, dataset.HighBit = 12, 11
    assert np.array_equal(gray(to_bytes(dataset)), gray(make(values, BitsStored=12)))


def test_lookup_tables() -> None:
    values = np.arange(16, dtype=np.uint8).reshape(4, 4)
    table = np.array([0, 1000, 40000, 65535], dtype=np.uint16)
    shown = gray(make(values, VOILUTSequence=[lookup_table(2, table, 16)], WindowCenter=5, WindowWidth=2))
    assert np.array_equal(shown, np.rint(table[np.clip(values.astype(int) - 2, 0, 3)] / 65535 * 255)), "the table wins"
    shown = gray(make(values, ModalityLUTSequence=[lookup_table(0, np.arange(16)[::-1] * 2, 8)]))
    assert np.array_equal(shown, 30 - 2 * values.astype(int))
    with pytest.raises(DataError, match="entries; its descriptor states 40"):
        item = lookup_table(0, np.arange(16), 8)
        item.LUTDescriptor = [40, 0, 8]
        gray(make(values, VOILUTSequence=[item]))


def test_a_palette_of_eight_bits_in_sixteen() -> None:
    values = np.array([[0, 1], [2, 3]], np.uint8)
    for scale in (1, 256):
        tables: dict[str, Any] = {}
        for color, entries in {"Red": [0, 10, 20, 255], "Green": [9, 9, 9, 9], "Blue": [255, 0, 0, 1]}.items():
            tables[f"{color}PaletteColorLookupTableDescriptor"] = [4, 0, 16]
            tables[f"{color}PaletteColorLookupTableData"] = (np.array(entries, "<u2") * scale).tobytes()
        image = decode.load_image(make(values, PhotometricInterpretation="PALETTE COLOR", **tables))
        assert np.asarray(image).reshape(-1, 3).tolist() == [[0, 9, 255], [10, 9, 0], [20, 9, 0], [255, 9, 1]]


def test_colors() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode.load_image(make(values))), values)
    planes = make_dataset(values, PlanarConfiguration=1)
    planes.PixelData = values.transpose(2, 0, 1).tobytes()
    assert np.array_equal(np.asarray(decode.load_image(to_bytes(planes))), values)
    deep = rng.integers(0, 4096, (6, 4, 3)).astype(np.uint16)
    assert np.array_equal(np.asarray(decode.load_image(make(deep, BitsStored=12))), np.rint(deep / 4095 * 255))
    full = np.asarray(decode.load_image(make(values, PhotometricInterpretation="YBR_FULL")), dtype=float)
    y, blue, red = (values[:, :, channel].astype(float) for channel in range(3))
    expected = np.stack([y + 1.402 * (red - 128), y - 0.344136 * (blue - 128) - 0.714136 * (red - 128)], axis=-1)
    assert np.abs(full[:, :, :2] - np.clip(expected, 0, 255)).max() <= 1
    with pytest.raises(DataError, match="in an unknown color space"):
        decode.load_image(make(values, PhotometricInterpretation="CMYK"))


def test_frames() -> None:
    frames = np.stack([np.full((4, 4), value, np.uint8) for value in (10, 20, 30, 40)])
    data = make(frames, NumberOfFrames=4)
    assert [int(gray(data, frame=name).max()) for name in ("first", "middle", "3")] == [10, 20, 40]
    with pytest.raises(DataError, match="has 4 frames, counted from 0; frame 4"):
        gray(data, frame="4")
    assert gray(make(frames[0]), frame="7").max() == 10, "frame is ignored for a file of one frame"


def test_windows_of_single_frames() -> None:
    groups = []
    for center in (0, 100):
        voi, group = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = center, 200
        group.FrameVOILUTSequence = [voi]
        groups.append(group)
    shared, transform = Dataset(), Dataset()
    transform.RescaleSlope, transform.RescaleIntercept = 2, 5
    shared.PixelValueTransformationSequence = [transform]
    groups_of = {"PerFrameFunctionalGroupsSequence": groups, "SharedFunctionalGroupsSequence": [shared]}
    data = make(np.stack([RAMP, RAMP]), NumberOfFrames=2, **groups_of)
    assert np.array_equal(gray(data), linear(RAMP * 2.0 + 5, 0, 200))
    assert np.array_equal(gray(data, frame="1"), linear(RAMP * 2.0 + 5, 100, 200))


@pytest.mark.parametrize(
    ("field", "value", "size"),
    [
        ("PixelAspectRatio", [4, 3], (30, 40)),
        ("PixelAspectRatio", [1, 2], (60, 30)),
        ("PixelSpacing", [0.5, 0.25], (30, 60)),
        ("PixelSpacing", [0.5, 0.501], (30, 30)),
        ("ImagerPixelSpacing", [1, 1000], (30, 30)),
    ],
)
def test_pixels_become_square(field: str, value: list[float], size: tuple[int, int]) -> None:
    assert decode.load_image(make(np.zeros((30, 30), np.uint8), **{field: value})).size == size


def test_content_decides_and_never_the_name(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(make(np.full((4, 4), 77, np.uint8)))
    assert decode.load_image("x.png", tmp_path).getpixel((0, 0)) == (77, 77, 77)
    Image.new("RGB", (3, 3), (1, 2, 3)).save(tmp_path / "y.png")
    (tmp_path / "y.png").rename(tmp_path / "y.dcm")
    assert decode.load_image("y.dcm", tmp_path).getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(DataError, match=r"y\.txt cannot be decoded"):
        (tmp_path / "y.txt").write_text("DICM!" * 40)
        decode.load_image("y.txt", tmp_path)


def test_bare_data_sets_are_read() -> None:
    for syntax in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian):
        dataset = make_dataset(np.full((4, 4), 77, np.uint8), TransferSyntaxUID=syntax)
        stream = io.BytesIO()
        pydicom.dcmwrite(stream, Dataset(dataset), implicit_vr=syntax.is_implicit_VR, little_endian=True)
        assert not stream.getvalue().startswith(b"\0" * 64)
        assert gray(stream.getvalue()).max() == 77


def test_a_bare_data_set_is_not_opened_as_another_format() -> None:
    stream = io.BytesIO()
    dataset = Dataset(make_dataset(np.full((4, 4), 77, np.uint8), TransferSyntaxUID=uid.ImplicitVRLittleEndian))
    pydicom.dcmwrite(stream, dataset, implicit_vr=True, little_endian=True)
    # Length to End and Image Type, as in files of before the file header. They are a header of TGA, too.
    values = ((1, struct.pack("<I", stream.tell() + 24)), (8, b"ORIGINAL\\PRIMARY"))
    head = b"".join(struct.pack("<HHI", 8, element, len(value)) + value for element, value in values)
    data = head + stream.getvalue()
    assert Image.open(io.BytesIO(data)).format == "TGA"
    assert gray(data).shape == (4, 4) and gray(data).max() == 77
    assert decode.stored_format(data) == "DICOM"


@pytest.mark.parametrize(
    "window", ["soft", "percentile:9", "percentile:60,40", "percentile:0,101", "1,0", "1,nan", "1,-5", ""]
)
def test_unknown_windows(window: str) -> None:
    with pytest.raises(ConfigError, match="DICOM window"):
        DicomPolicy(window)


@pytest.mark.parametrize("frame", ["last", "-1", "1.5", "", "²", "1\n", "9" * 5000])
def test_unknown_frames(frame: str) -> None:
    with pytest.raises(ConfigError, match="DICOM frame"):
        DicomPolicy(frame=frame)


def test_the_policy_is_kept_with_the_processor(tiny: LoadedModel, tmp_path: Path) -> None:
    processor = tiny.processor.changed(dicom=DicomPolicy("lung", "middle"))
    assert processor.image_fingerprint != tiny.processor.image_fingerprint
    processor.save_pretrained(tmp_path)
    again = LlavaMedProcessor.from_pretrained(tmp_path)
    assert again.dicom == DicomPolicy("lung", "middle")
    assert again.image_fingerprint == processor.image_fingerprint
    first = again.changed(dicom=again.dicom.changed(None, "first"))
    assert first.dicom == DicomPolicy("lung", "first") and first.image_fingerprint != processor.image_fingerprint
    file = tmp_path / "llava_processor.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(CheckpointError, match="version 99"):
        LlavaMedProcessor.from_pretrained(tmp_path)
