"""DICOM files made for one rule each: windows, polarity, depth, palettes, frames, limits, silence."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset

from llava.data import dicom_header, dicom_pixels, images
from llava.data.dicom_codestream import Extent, extent_of
from llava.data.dicom_policy import PRESETS, DicomPolicy
from llava.errors import CheckpointError, ConfigError, DataError, LlavaError, MissingDependency, NotAPicture
from llava.model.building import Loaded
from llava.processing import LlavaMedProcessor
from tests.dicom_files import SECRET, corpus, lookup_table, make, make_dataset, to_bytes

ROOT = Path(__file__).resolve().parents[2]

RAMP = np.arange(-128, 128, dtype=np.int16).reshape(16, 16) * 8
"""-1024 to 1016."""


def grey(data: bytes, window: str = "file", frame: str = "first") -> NDArray[Any]:
    """The red channel of a file's picture, as whole numbers."""
    picture = images.load(data, dicom=DicomPolicy(window, frame))
    assert picture.mode == "RGB"
    return np.asarray(picture)[:, :, 0].astype(int)


def linear(values: NDArray[Any], center: float, width: float) -> NDArray[Any]:
    """C.11.2.1.2.1, condition by condition."""
    below, above = values <= center - 0.5 - (width - 1) / 2, values > center - 0.5 + (width - 1) / 2
    inside = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    return np.rint(np.where(below, 0, np.where(above, 255, inside))).astype(int)


def test_the_first_window_after_rescaling() -> None:
    data = make(RAMP, WindowCenter=[40, 500], WindowWidth=[400, 9], RescaleSlope="2", RescaleIntercept="-100")
    assert np.array_equal(grey(data), linear(RAMP * 2.0 - 100, 40, 400))
    inverted = make(RAMP, WindowCenter=40, WindowWidth=400, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(grey(inverted), 255 - linear(RAMP, 40, 400))


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        ("LINEAR_EXACT", lambda x: np.clip((x - 40) / 400 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 40) / 400))),
    ],
)
def test_other_functions(function: str, formula: Any) -> None:
    data = make(RAMP, WindowCenter=40, WindowWidth=400, VOILUTFunction=function)
    assert np.abs(grey(data) - formula(RAMP.astype(float)) * 255).max() <= 0.5 + 1e-9


def test_a_function_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(DataError, match="VOI LUT Function is none of LINEAR"):
        grey(make(RAMP, WindowCenter=40, WindowWidth=400, VOILUTFunction="CUBIC"))


@pytest.mark.parametrize("width", [0, -5, None])
def test_a_window_that_makes_no_sense_counts_as_none(width: int | None) -> None:
    data = make(RAMP, WindowCenter=40, WindowWidth=width)
    assert np.array_equal(grey(data), grey(data, "full"))
    assert grey(data).min() == 0 and grey(data).max() == 255


def test_narrow_windows() -> None:
    step = grey(make(RAMP, WindowCenter=8, WindowWidth=1))
    assert np.array_equal(step, np.where(RAMP > 7.5, 255, 0))
    fraction = grey(make(RAMP, WindowCenter=8, WindowWidth="0.5"))
    assert set(np.unique(fraction)) == {0, 128, 255}


def test_presets_are_for_ct_only() -> None:
    window = {"WindowCenter": 0, "WindowWidth": 100}
    for name, (center, width) in PRESETS.items():
        assert np.array_equal(grey(make(RAMP, Modality="CT", **window), name), linear(RAMP, center, width))
        assert np.array_equal(grey(make(RAMP, Modality="MR", **window), name), linear(RAMP, 0, 100))
    assert np.array_equal(grey(make(RAMP, Modality="MR", **window), "40,400"), linear(RAMP, 40, 400))


def test_padding_never_moves_an_automatic_window() -> None:
    values = RAMP.copy()
    values[0] = -2000
    plain, padded = make(values), make(values, PixelPaddingValue=-2000)
    assert grey(plain)[1].min() > 90
    assert grey(padded)[1].min() == 0 and grey(padded)[0].max() == 0
    assert np.array_equal(grey(padded, "full"), grey(padded))
    ranged = make(values, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-770)
    assert grey(ranged)[1].max() == 0
    only = make(np.full((4, 4), -2000, np.int16), PixelPaddingValue=-2000)
    assert grey(only).max() == 0


def test_percentiles() -> None:
    low, high = np.percentile(RAMP, (10, 90))
    expected = np.rint(np.clip((RAMP - low) / (high - low), 0, 1) * 255)
    assert np.array_equal(grey(make(RAMP), "percentile:10,90"), expected)


@pytest.mark.parametrize(
    ("kind", "bits"), [("u1", 8), ("u1", 6), ("i1", 8), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16)]
)
def test_depths(kind: str, bits: int) -> None:
    low = -(2 ** (bits - 1)) if kind[0] == "i" else 0
    values = np.linspace(low, low + 2**bits - 1, 64).astype(kind).reshape(8, 8)
    expected = np.rint((values.astype(float) - low) / (2**bits - 1) * 255)
    assert np.array_equal(grey(make(values, BitsStored=bits)), expected)


def test_eight_bits_without_a_window_are_not_stretched() -> None:
    assert grey(make(np.full((4, 4), 100, np.uint8))).max() == 100


def test_bits_of_overlays_in_unused_bits_are_not_shown() -> None:
    values = np.arange(16, dtype=np.uint16).reshape(4, 4)
    assert np.array_equal(grey(make(values | 0xF000, BitsStored=12)), grey(make(values, BitsStored=12)))


def test_lookup_tables() -> None:
    values = np.arange(16, dtype=np.uint8).reshape(4, 4)
    table = np.array([0, 1000, 40000, 65535], dtype=np.uint16)
    shown = grey(make(values, VOILUTSequence=[lookup_table(2, table, 16)], WindowCenter=5, WindowWidth=2))
    assert np.array_equal(shown, np.rint(table[np.clip(values.astype(int) - 2, 0, 3)] / 65535 * 255)), "the table wins"
    shown = grey(make(values, ModalityLUTSequence=[lookup_table(0, np.arange(16)[::-1] * 2, 8)]))
    assert np.array_equal(shown, 30 - 2 * values.astype(int))
    with pytest.raises(DataError, match="entries that promises 40"):
        item = lookup_table(0, np.arange(16), 8)
        item.LUTDescriptor = [40, 0, 8]
        grey(make(values, VOILUTSequence=[item]))


def test_a_palette_of_eight_bits_in_sixteen() -> None:
    values = np.array([[0, 1], [2, 3]], np.uint8)
    for scale in (1, 256):
        tables: dict[str, Any] = {}
        for color, entries in {"Red": [0, 10, 20, 255], "Green": [9, 9, 9, 9], "Blue": [255, 0, 0, 1]}.items():
            tables[f"{color}PaletteColorLookupTableDescriptor"] = [4, 0, 16]
            tables[f"{color}PaletteColorLookupTableData"] = (np.array(entries, "<u2") * scale).tobytes()
        picture = images.load(make(values, PhotometricInterpretation="PALETTE COLOR", **tables))
        assert np.asarray(picture).reshape(-1, 3).tolist() == [[0, 9, 255], [10, 9, 0], [20, 9, 0], [255, 9, 1]]


def test_colours() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(images.load(make(values))), values)
    planes = make_dataset(values, PlanarConfiguration=1)
    planes.PixelData = values.transpose(2, 0, 1).tobytes()
    assert np.array_equal(np.asarray(images.load(to_bytes(planes))), values)
    deep = rng.integers(0, 4096, (6, 4, 3)).astype(np.uint16)
    assert np.array_equal(np.asarray(images.load(make(deep, BitsStored=12))), np.rint(deep / 4095 * 255))
    full = np.asarray(images.load(make(values, PhotometricInterpretation="YBR_FULL")), dtype=float)
    y, blue, red = (values[:, :, channel].astype(float) for channel in range(3))
    expected = np.stack([y + 1.402 * (red - 128), y - 0.344136 * (blue - 128) - 0.714136 * (red - 128)], axis=-1)
    assert np.abs(full[:, :, :2] - np.clip(expected, 0, 255)).max() <= 1
    with pytest.raises(DataError, match="colour space that is not known"):
        images.load(make(values, PhotometricInterpretation="CMYK"))


def test_frames() -> None:
    frames = np.stack([np.full((4, 4), value, np.uint8) for value in (10, 20, 30, 40)])
    data = make(frames, NumberOfFrames=4)
    assert [int(grey(data, frame=name).max()) for name in ("first", "middle", "3")] == [10, 20, 40]
    with pytest.raises(DataError, match="has 4 frames, so there is no frame 4"):
        grey(data, frame="4")
    assert grey(make(frames[0]), frame="7").max() == 10, "a file of one picture has no choice"


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
    assert np.array_equal(grey(data), linear(RAMP * 2.0 + 5, 0, 200))
    assert np.array_equal(grey(data, frame="1"), linear(RAMP * 2.0 + 5, 100, 200))


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
    assert images.load(make(np.zeros((30, 30), np.uint8), **{field: value})).size == size


def test_content_decides_and_never_the_name(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(make(np.full((4, 4), 77, np.uint8)))
    assert images.load("x.png", tmp_path).getpixel((0, 0)) == (77, 77, 77)
    Image.new("RGB", (3, 3), (1, 2, 3)).save(tmp_path / "y.png")
    (tmp_path / "y.png").rename(tmp_path / "y.dcm")
    assert images.load("y.dcm", tmp_path).getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(DataError, match=r"y\.txt cannot be decoded"):
        (tmp_path / "y.txt").write_text("DICM!" * 40)
        images.load("y.txt", tmp_path)


def test_bare_data_sets_are_read() -> None:
    for syntax in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian):
        dataset = make_dataset(np.full((4, 4), 77, np.uint8), TransferSyntaxUID=syntax)
        stream = io.BytesIO()
        pydicom.dcmwrite(stream, Dataset(dataset), implicit_vr=syntax.is_implicit_VR, little_endian=True)
        assert not stream.getvalue().startswith(b"\0" * 64)
        assert grey(stream.getvalue()).max() == 77


def test_limits_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for fields, message in (
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels, more than"),
        ({"NumberOfFrames": 2**30}, "states 1073741824 frames"),
        ({"NumberOfFrames": 1000}, "is cut off"),
        ({"Rows": 0}, "is empty"),
        ({"BitsAllocated": 24}, "bits stored in 24"),
        ({"SamplesPerPixel": 2}, "2 values a pixel"),
        ({"PixelData": None}, "holds none"),
        ({"PixelAspectRatio": [20, 1], "Rows": 30000, "Columns": 300}, "cut off"),
    ):
        dataset = make_dataset(np.zeros((4, 4), np.uint8))
        for name, value in fields.items():
            if value is None:
                del dataset[name]
            else:
                setattr(dataset, name, value)
        with pytest.raises(DataError, match=message):
            images.load(to_bytes(dataset))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="once they are square"):
        images.load(make(np.zeros((5, 4), np.uint8), PixelAspectRatio=[10, 1]))


def test_a_deflated_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(np.zeros((1000, 1000), np.uint8), TransferSyntaxUID=uid.DeflatedExplicitVRLittleEndian)
    assert len(data) < 5000 and images.load(data).size == (1000, 1000)
    monkeypatch.setattr(dicom_header, "MAX_INFLATED", 100_000)
    with pytest.raises(DataError, match="unpacks to more than"):
        images.load(data)


def test_compressed_data_that_state_another_size_are_not_decoded() -> None:
    data = next(path for _, path in corpus() if path.name == "MR_small_jp2klossless.dcm").read_bytes()
    place = data.index(b"\xff\x4f\xff\x51") + 8
    bomb = data[:place] + (60000).to_bytes(4, "big") * 2 + data[place + 8 :]
    with pytest.raises(DataError, match="compressed picture of 60000 x 60000"):
        images.load(bomb)
    stream = io.BytesIO()
    Image.new("L", (30, 20)).save(stream, format="JPEG")
    assert extent_of(stream.getvalue()) == Extent(20, 30, 1, 8)
    assert extent_of(stream.getvalue()[:20]) is None and extent_of(b"") is None


def test_a_missing_decoder_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    data = next(path for _, path in corpus() if path.name == "MR_small_jpeg_ls_lossless.dcm").read_bytes()
    monkeypatch.setitem(dicom_pixels.DECODERS, uid.JPEGLSLossless, ("pylibjpeg",))
    with pytest.raises(MissingDependency, match=r"pip install 'llava\[data\]'"):
        images.load(data)


def test_licences_of_decoders() -> None:
    assert {name for names in dicom_pixels.DECODERS.values() for name in names} <= {*dicom_pixels.PACKAGES, "pydicom"}
    assert not any("libjpeg" in name.replace("pylibjpeg", "") for name in dicom_pixels.PACKAGES.values())


def test_videos_are_named() -> None:
    dataset = pydicom.dcmread(io.BytesIO(make(np.zeros((4, 4), np.uint8))))
    dataset.file_meta.TransferSyntaxUID = uid.MPEG4HP41
    dataset["PixelData"].is_undefined_length = True
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0\0\0\1" * 4])
    with pytest.raises(DataError, match="MPEG-4"):
        images.load(to_bytes(dataset))


def test_a_modality_says_what_a_file_without_a_class_is() -> None:
    dataset = make_dataset(np.zeros((4, 4), np.uint8))
    dataset.Modality = "RTDOSE"
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.3.999"
    with pytest.raises(NotAPicture, match="a radiotherapy dose") as caught:
        images.load(to_bytes(dataset))
    assert "1.2.3.999" not in str(caught.value)


def test_nobody_is_named_in_errors_and_logs(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Values that pydicom would quote stand in fields that are read; the patient's stand in fields that are not."""
    bad = [
        ("Rows", "US"),
        ("WindowCenter", "DS"),
        ("NumberOfFrames", "IS"),
        ("PixelSpacing", "DS"),
        ("SOPClassUID", "UI"),
    ]
    messages = []
    for keyword, kind in bad:
        data = make(RAMP, WindowCenter=40, WindowWidth=400)
        dataset = pydicom.dcmread(io.BytesIO(data))
        raw = SECRET.encode() + b"\0"
        dataset._dict[pydicom.tag.Tag(keyword)] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(keyword), kind, len(raw), raw, 0, False, True
        )
        broken = to_bytes(dataset)
        assert broken.count(SECRET.encode()) >= 2
        caplog.clear()
        caplog.set_level(logging.DEBUG)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                images.load(broken)
            except LlavaError as error:
                messages += [str(error), repr(error.__cause__), str(error.__suppress_context__)]
        messages += [str(warning.message) for warning in caught] + [caplog.text]
    printed = capfd.readouterr()
    assert any("WindowCenter" in message for message in messages)
    assert not [text for text in (*messages, printed.out, printed.err) if SECRET[:5] in text]


def test_silence_ends_with_the_reading() -> None:
    before, level = list(warnings.filters), logging.getLogger("pydicom").level
    images.load(make(RAMP))
    with pytest.raises(DataError):
        images.load(make(RAMP)[:-9])
    assert list(warnings.filters) == before and logging.getLogger("pydicom").level == level


@pytest.mark.parametrize(
    "window", ["soft", "percentile:9", "percentile:60,40", "percentile:0,101", "1,0", "1,nan", "1,-5", ""]
)
def test_unknown_windows(window: str) -> None:
    with pytest.raises(ConfigError, match="DICOM window"):
        DicomPolicy(window)


@pytest.mark.parametrize("frame", ["last", "-1", "1.5", "", "²"])
def test_unknown_frames(frame: str) -> None:
    with pytest.raises(ConfigError, match="DICOM frame"):
        DicomPolicy(frame=frame)


def test_the_policy_is_kept_with_the_processor(tiny: Loaded, tmp_path: Path) -> None:
    processor = tiny.processor
    default = processor.image_fingerprint
    processor.use_dicom(DicomPolicy("lung", "middle"))
    assert processor.image_fingerprint != default
    processor.save_pretrained(tmp_path)
    again = LlavaMedProcessor.from_pretrained(tmp_path)
    assert again.dicom == DicomPolicy("lung", "middle")
    assert again.image_fingerprint == processor.image_fingerprint
    again.use_dicom(again.dicom.changed(None, "first"))
    assert again.dicom == DicomPolicy("lung", "first") and again.image_fingerprint != processor.image_fingerprint
    file = tmp_path / "llava_processor.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(CheckpointError, match="version 99"):
        LlavaMedProcessor.from_pretrained(tmp_path)


SEEDS = ("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_small_odd_jpeg.dcm")
FUZZ_SEEDS = [path.read_bytes() for _, path in corpus() if path.name in SEEDS]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_bytes_never_crash(data: st.DataObject) -> None:
    """Bytes replaced, cut out or doubled: a picture, or an error of ours."""
    content = bytearray(data.draw(st.sampled_from(FUZZ_SEEDS)))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "double"]))
        if kind == "set":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place : place + data.draw(st.integers(1, 40))]
        else:
            content[place:place] = content[place : place + 30]
        if not content:
            break
    try:
        assert images.load(bytes(content)).mode == "RGB"
    except LlavaError as error:
        assert str(error)


def test_a_head_of_unknown_types_is_a_named_error() -> None:
    data = make(np.zeros((4, 4), np.uint8))
    place = data.index(b"\x02\x00\x02\x00UI") + 4
    with pytest.raises(DataError, match="given as bytes has a head that cannot be understood"):
        images.load(data[:place] + b"U." + data[place + 2 :])


@pytest.mark.slow
def test_a_short_guided_fuzz(tmp_path: Path) -> None:
    """A few hundred inputs; `tests/data/fuzz_dicom.py` says how to run longer."""
    pytest.importorskip("atheris", reason="atheris is not installed (extra dev, Linux only)")
    words = ["-runs=500", "-max_len=12000", "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, "-m", "tests.data.fuzz_dicom", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.iterdir()) and "Done 500 runs" in done.stderr
