"""Identity inside the pixel field: removed with equal decoded pixels, or the file is held back with the reason."""

from __future__ import annotations

import io
import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames

from llava.data.dicom import deid
from llava.data.dicom.clean_pixels import check_copy, clean_pixel_field
from llava.data.dicom.clean_streams import PixelsHeldBack, clean_jpeg, clean_jpeg2000, clean_rle
from llava.errors import DataError
from llava.imaging.dicom.pixels import PixelFormat, frame_values
from tests.support.dicom_files import SECRET, lookup_table, make_dataset, to_bytes

RECORD = b"MRN-00987654 " + SECRET.encode()
"""Text planted in pixel fields."""

RNG = np.random.default_rng(5)
GRAY = RNG.integers(0, 250, (40, 48), dtype=np.uint8)
DEEP = RNG.integers(0, 4096, (40, 48)).astype(np.uint16)


def run(tmp_path: Path, dataset: Dataset | bytes) -> tuple[dict[str, Any], bytes, bytes]:
    """Return the report entry of `data deid` for a file, its bytes, and the bytes of its copy (empty without one)."""
    folder = tmp_path / "in"
    folder.mkdir()
    data = dataset if isinstance(dataset, bytes) else to_bytes(dataset)
    (folder / "x").write_bytes(data)
    report = tmp_path / "report.json"
    words = [str(folder), "--out", str(tmp_path / "out"), "--salt-file", str(tmp_path / "salt")]
    deid.main([*words, "--report", str(report), "--burned-in", "keep"])
    copies = [file.read_bytes() for file in (tmp_path / "out").rglob("*.dcm")]
    return json.loads(report.read_text())["x"], data, copies[0] if copies else b""


def frames_of(data: bytes) -> list[NDArray[Any]]:
    dataset = pydicom.dcmread(io.BytesIO(data))
    pixel_format = PixelFormat.of(dataset, max_pixels=1 << 30)
    return [frame_values(dataset, pixel_format, index)[0] for index in range(pixel_format.num_frames)]


def assert_clean(entry: dict[str, Any], data: bytes, copy: bytes, *found: str) -> None:
    assert copy and entry["copy"] and "left_out" not in entry, entry
    for name in found:
        assert any(name in each for each in entry["in_pixels"]), entry["in_pixels"]
    for secret in (RECORD, RECORD[:8], SECRET.encode(), SECRET[:5].encode()):
        assert secret in data and secret not in copy
    assert len(frames_of(data)) == len(frames_of(copy))
    assert all(np.array_equal(*pair) for pair in zip(frames_of(data), frames_of(copy), strict=True))


def photo(color: bool, **options: Any) -> bytes:
    values = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], axis=-1) if color else GRAY
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG", **options)
    return stream.getvalue()


def compressed(syntax: str, frames: list[bytes], values: NDArray[Any], **fields: Any) -> FileDataset:
    """Return a file with the given compressed frames, which show `values`."""
    dataset = make_dataset(values, **({"NumberOfFrames": len(frames)} if len(frames) > 1 else {}), **fields)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return dataset


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def exif_with_thumbnail() -> bytes:
    exif = Image.Exif()
    exif[0x013B] = RECORD.decode()
    exif[0x8298] = RECORD.decode()
    return exif.tobytes() + photo(True, comment=RECORD)


JPEG_SEGMENTS = {
    "comment": segment(0xFE, RECORD),
    "exif with a thumbnail": segment(0xE1, exif_with_thumbnail()),
    "xmp": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>" + RECORD + b"</x>"),
    "icc profile": segment(0xE2, b"ICC_PROFILE\0\1\1" + RECORD),
    "photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x20" + RECORD),
    "jfif extension": segment(0xE0, b"JFXX\0\x10" + RECORD),
    "spiff": segment(0xE8, b"SPIFF\0" + RECORD),
    "fill bytes": b"\xff\xff" + segment(0xFE, RECORD),
}


def lossless(values: NDArray[Any], syntax: str) -> bytes:
    """Return one frame that pydicom compresses."""
    dataset = make_dataset(values, BitsStored=12 if values.dtype == np.uint16 else 8)
    plugins = {uid.JPEGLSLossless: "pyjpegls", uid.JPEG2000Lossless: "pylibjpeg", uid.RLELossless: "pydicom"}
    dataset.compress(syntax, encoding_plugin=plugins[syntax], generate_instance_uid=False)
    return next(generate_frames(dataset.PixelData, number_of_frames=1))


def jpeg_lossless(values: NDArray[np.uint8]) -> bytes:
    """Return a JPEG lossless frame (process 14, first-order prediction) of bytes.

    Every difference category has a code of 4 bits, so that the coder is short: category, then its bits.
    """
    height, width = values.shape
    bits = ""
    for row in range(height):
        for column in range(width):
            before = 128 if row == column == 0 else int(values[row - 1, 0] if column == 0 else values[row, column - 1])
            step = int(values[row, column]) - before
            size = abs(step).bit_length()
            bits += f"{size:04b}" + (f"{step if step > 0 else step + (1 << size) - 1:0{size}b}" if size else "")
    bits += "1" * (-len(bits) % 8)
    coded = bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    table = segment(0xC4, bytes([0, 0, 0, 0, 9, *[0] * 12, *range(9)]))
    head = segment(0xC3, struct.pack(">BHHB3B", 8, height, width, 1, 1, 0x11, 0))
    return b"\xff\xd8" + head + table + segment(0xDA, bytes([1, 1, 0, 1, 0, 0])) + coded + b"\xff\xd9"


CODECS: dict[str, Callable[[], tuple[str, bytes, NDArray[Any], dict[str, Any]]]] = {
    "baseline": lambda: (uid.JPEGBaseline8Bit, photo(False), GRAY, {}),
    "baseline color": lambda: (
        uid.JPEGBaseline8Bit,
        photo(True),
        np.stack([GRAY] * 3, axis=-1),
        {"PhotometricInterpretation": "YBR_FULL_422"},
    ),
    "progressive": lambda: (uid.JPEGExtended12Bit, photo(False, progressive=True), GRAY, {}),
    "lossless": lambda: (uid.JPEGLosslessSV1, jpeg_lossless(GRAY), GRAY, {}),
    "jpeg-ls": lambda: (uid.JPEGLSLossless, lossless(GRAY, uid.JPEGLSLossless), GRAY, {}),
    "jpeg-ls 12 bits": lambda: (uid.JPEGLSLossless, lossless(DEEP, uid.JPEGLSLossless), DEEP, {"BitsStored": 12}),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("planted", JPEG_SEGMENTS)
def test_segments_of_jpeg_streams(tmp_path: Path, codec: str, planted: str) -> None:
    syntax, frame, values, fields = CODECS[codec]()
    dataset = compressed(syntax, [frame[:2] + JPEG_SEGMENTS[planted] + frame[2:]], values, **fields)
    assert_clean(*run(tmp_path, dataset), "JPEG")


def test_the_lossless_stream_of_these_tests_is_one(tmp_path: Path) -> None:
    dataset = compressed(uid.JPEGLosslessSV1, [jpeg_lossless(GRAY)], GRAY)
    entry, data, copy = run(tmp_path, dataset)
    assert np.array_equal(frames_of(data)[0], GRAY) and np.array_equal(frames_of(copy)[0], GRAY)
    assert entry["in_pixels"] == {}


def plant_in_j2k(frame: bytes, where: str) -> bytes:
    """Return a JPEG 2000 codestream with the record in a comment, a box or behind it."""
    comment = b"\xff\x64" + struct.pack(">HH", len(RECORD) + 4, 1) + RECORD
    tile = frame.index(b"\xff\x90")
    if where == "main header":
        return frame[:tile] + comment + frame[tile:]
    if where == "tile header":
        length = int.from_bytes(frame[tile + 6 : tile + 10], "big") + len(comment)
        return (
            frame[: tile + 6] + length.to_bytes(4, "big") + frame[tile + 10 : tile + 12] + comment + frame[tile + 12 :]
        )
    if where == "end":
        return frame + RECORD
    kind = {"xml box": b"xml ", "uuid box": b"uuid"}[where]
    stream = io.BytesIO()
    Image.fromarray(GRAY).save(stream, "JPEG2000", irreversible=False)
    boxed = stream.getvalue()
    place = boxed.index(b"jp2c") - 4
    return boxed[:place] + struct.pack(">I", 8 + len(RECORD)) + kind + RECORD + boxed[place:]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("where", ["main header", "tile header", "end", "xml box", "uuid box"])
def test_comments_and_boxes_of_jpeg_2000(tmp_path: Path, where: str, deep: bool) -> None:
    values = DEEP if deep and "box" not in where else GRAY
    frame = plant_in_j2k(lossless(values, uid.JPEG2000Lossless), where)
    dataset = compressed(uid.JPEG2000Lossless, [frame], values, BitsStored=12 if values is DEEP else 8)
    named = "behind" if where == "end" else "JPEG 2000"
    assert_clean(*run(tmp_path, dataset), named)


BEHIND = {
    "jpeg": lambda: (uid.JPEGBaseline8Bit, photo(False) + RECORD, GRAY),
    "second jpeg stream": lambda: (uid.JPEGBaseline8Bit, photo(False) + photo(False, comment=RECORD), GRAY),
    "jpeg lossless": lambda: (uid.JPEGLosslessSV1, jpeg_lossless(GRAY) + RECORD, GRAY),
    "jpeg-ls": lambda: (uid.JPEGLSLossless, lossless(GRAY, uid.JPEGLSLossless) + RECORD, GRAY),
    "rle": lambda: (uid.RLELossless, lossless(GRAY, uid.RLELossless) + RECORD, GRAY),
    "rle of 16 bits": lambda: (uid.RLELossless, lossless(DEEP, uid.RLELossless) + RECORD, DEEP),
    "between rle segments": lambda: (uid.RLELossless, between_segments(), DEEP),
    "rle header": lambda: (uid.RLELossless, in_rle_header(), GRAY),
}


def between_segments() -> bytes:
    frame = lossless(DEEP, uid.RLELossless)
    count, first, second = struct.unpack("<3I", frame[:12])
    head = struct.pack("<3I", count, first, second + len(RECORD)) + frame[12:64]
    return head + frame[64:second] + RECORD + frame[second:]


def in_rle_header() -> bytes:
    frame = lossless(GRAY, uid.RLELossless)
    return frame[:12] + RECORD.ljust(52, b"\0") + frame[64:]


@pytest.mark.parametrize("kind", BEHIND)
def test_bytes_outside_of_a_compressed_image(tmp_path: Path, kind: str) -> None:
    syntax, frame, values = BEHIND[kind]()
    assert_clean(*run(tmp_path, compressed(syntax, [frame], values)), "RLE" if "rle" in kind else "behind the end")


@pytest.mark.parametrize("table", ["basic", "none", "extended", "two fragments", "fragment behind the last"])
@pytest.mark.parametrize("codec", ["jpeg", "rle"])
def test_later_frames_and_fragments(tmp_path: Path, codec: str, table: str) -> None:
    if codec == "jpeg":
        syntax, frames = uid.JPEGBaseline8Bit, [photo(False), photo(False, comment=RECORD, quality=60)]
    else:
        syntax, frames = uid.RLELossless, [lossless(GRAY, uid.RLELossless), lossless(GRAY, uid.RLELossless) + RECORD]
        if table == "two fragments":
            pytest.skip("the standard has one fragment for each run-length encoded frame")
    dataset = compressed(syntax, frames, np.stack([GRAY, GRAY]))
    if table == "none":
        dataset.PixelData = encapsulate(frames, has_bot=False)
    elif table == "two fragments":
        dataset.PixelData = encapsulate(frames, fragments_per_frame=2)
    elif table == "extended":
        dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(
            frames
        )
    elif table == "fragment behind the last":
        dataset.PixelData = encapsulate([*frames, RECORD + b"\0" * (len(RECORD) % 2)], has_bot=False)
    entry, data, copy = run(tmp_path, dataset)
    if codec == "rle" and table == "fragment behind the last":  # not decodable: fragments are frames there
        assert not copy and "cannot be decoded" in entry["left_out"]
        return
    assert_clean(entry, data, copy, "JPEG comment" if codec == "jpeg" else "RLE segment")
    assert "ExtendedOffsetTable" not in pydicom.dcmread(io.BytesIO(copy))


def test_fragments_that_an_extended_table_passes_over(tmp_path: Path) -> None:
    frames = [photo(False), photo(False, quality=60)]
    dataset = compressed(uid.JPEGBaseline8Bit, frames, np.stack([GRAY, GRAY]))
    hidden = RECORD * 9 + b"\0" * (9 * len(RECORD) % 2)
    dataset.PixelData, _, _ = encapsulate_extended([frames[0], hidden, frames[1]])
    places = [0, 16 + len(frames[0]) + len(frames[0]) % 2 + len(hidden)]
    dataset.ExtendedOffsetTable = struct.pack("<2Q", *places)
    dataset.ExtendedOffsetTableLengths = struct.pack("<2Q", *map(len, frames))
    assert_clean(*run(tmp_path, dataset), "fragments outside of the frames")


NATIVE = {
    "8 bits": (GRAY, {}),
    "odd number of bytes": (GRAY[:3, :7], {}),
    "16 bits": (DEEP, {"BitsStored": 12}),
    "color": (np.stack([GRAY] * 3, axis=-1), {}),
    "two frames": (np.stack([GRAY, GRAY[::-1]]), {"NumberOfFrames": 2}),
    "signed": (DEEP.astype(np.int16) - 2048, {"BitsStored": 12}),
    "32 bits": (DEEP.astype(np.uint32), {}),
}


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_bytes_behind_uncompressed_pixels(tmp_path: Path, kind: str, syntax: str) -> None:
    values, fields = NATIVE[kind]
    dataset = make_dataset(values, TransferSyntaxUID=syntax, **fields)
    dataset.PixelData = values.tobytes() + RECORD + b"\0" * ((values.nbytes + len(RECORD)) % 2)
    entry, data, copy = run(tmp_path, dataset)
    assert_clean(entry, data, copy, "bytes behind the pixels")
    assert len(pydicom.dcmread(io.BytesIO(copy)).PixelData) == values.nbytes + values.nbytes % 2


def annotation(shape: tuple[int, int]) -> NDArray[np.bool_]:
    page = Image.new("1", shape[::-1])
    ImageDraw.Draw(page).text((1, 1), "MRN 98", fill=1)
    return np.asarray(page)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "form",
    [
        ("u2", 12, 11, 12), ("u2", 12, 11, 15), ("u2", 10, 9, 14), ("u2", 12, 15, 0), ("u2", 15, 14, 15),
        ("i2", 12, 11, 13), ("i2", 15, 14, 15), ("i2", 12, 15, 2), ("u1", 7, 6, 7), ("i1", 6, 5, 6), ("u1", 6, 7, 1),
        ("u4", 20, 19, 24),
    ],
)  # fmt: skip
def test_overlays_in_unused_bits(tmp_path: Path, form: tuple[str, int, int, int], order: str) -> None:
    kind, bits, high, bit = form
    low = -(1 << bits - 1) if kind[0] == "i" else 0
    values = RNG.integers(low, low + (1 << bits), GRAY.shape)
    drawn = annotation(GRAY.shape)
    width = int(kind[1])
    stored = (values << high - bits + 1) & ((1 << 8 * width) - 1)  # with sign extension
    planted = np.where(drawn, stored ^ (1 << bit), stored).astype(f"{order}u{width}")
    syntax = uid.ExplicitVRLittleEndian if order == "<" else uid.ExplicitVRBigEndian
    dataset = make_dataset(values.astype(kind), BitsStored=bits, HighBit=high, TransferSyntaxUID=syntax)
    dataset.PixelData = planted.tobytes()
    plain, stream = Dataset(dataset), io.BytesIO()
    plain.file_meta = dataset.file_meta
    pydicom.dcmwrite(stream, plain, enforce_file_format=True)
    entry, data, copy = run(tmp_path, stream.getvalue())
    assert entry["in_pixels"] and "overlay" in next(iter(entry["in_pixels"]))
    assert np.array_equal(frames_of(data)[0], values) and np.array_equal(frames_of(copy)[0], values)
    kept = np.frombuffer(pydicom.dcmread(io.BytesIO(copy)).PixelData, f"{order}u{width}").reshape(GRAY.shape)
    assert np.array_equal(kept, stored), "unused bits hold the sign only"


@pytest.mark.parametrize("codec", ["rle", "jpeg-ls"])
def test_overlays_in_compressed_bits_hold_the_file_back(tmp_path: Path, codec: str) -> None:
    planted = DEEP | (annotation(DEEP.shape).astype(np.uint16) << 13)
    dataset = make_dataset(planted, BitsStored=16)
    syntax = uid.RLELossless if codec == "rle" else uid.JPEGLSLossless
    plugin = "pydicom" if codec == "rle" else "pyjpegls"
    dataset.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
    dataset.BitsStored, dataset.HighBit = 12, 11
    entry, _, copy = run(tmp_path, dataset)
    assert not copy and "overlay" in entry["left_out"] and "uncompressed form first" in entry["left_out"]
    assert "fields" in entry, "what was found is reported all the same"


def test_bits_and_bytes_behind_single_bits(tmp_path: Path) -> None:
    bits = RNG.integers(0, 2, (5, 7)).astype(np.uint8)
    dataset = make_dataset(bits, BitsAllocated=1, BitsStored=1, HighBit=0)
    packed = np.packbits(np.concatenate((bits.ravel(), np.ones(5, np.uint8))), bitorder="little").tobytes()
    dataset.PixelData = packed + RECORD
    dataset.PixelData += b"\0" * (len(dataset.PixelData) % 2)
    entry, data, copy = run(tmp_path, dataset)
    assert_clean(entry, data, copy, "bits behind the pixels", "bytes behind the pixels")
    assert np.array_equal(frames_of(copy)[0], bits)


def test_icons_nested_pixels_and_tables(tmp_path: Path) -> None:
    icon = make_dataset(GRAY[:8, :8])
    icon.PixelData = RECORD * 4
    nested = Dataset()
    nested.add_new("PixelData", "OW", RECORD + b"\0" * (len(RECORD) % 2))
    table = lookup_table(0, np.arange(256), 8)
    table.LUTData = table.LUTData + RECORD + b"\0" * (len(RECORD) % 2)
    block_item = Dataset()
    block_item.private_block(0x0029, "X", create=True).add_new(1, "OB", RECORD)
    dataset = make_dataset(GRAY, IconImageSequence=[icon], VOILUTSequence=[table])
    dataset.SharedFunctionalGroupsSequence = [nested]
    dataset.PerFrameFunctionalGroupsSequence = [block_item]
    entry, data, copy = run(tmp_path, dataset)
    assert_clean(entry, data, copy, "bytes behind a lookup table")
    assert entry["fields"]["IconImageSequence"] == "removed"
    assert entry["fields"]["SharedFunctionalGroupsSequence.PixelData"] == "removed" and entry["num_private"]


@pytest.mark.parametrize("planted", [SECRET.split("^")[1].encode(), SECRET.encode("utf-16-le")])
def test_texts_of_the_header_among_pixels_hold_the_file_back(tmp_path: Path, planted: bytes) -> None:
    values = GRAY.copy()
    values.reshape(-1)[100 : 100 + len(planted)] = np.frombuffer(planted, np.uint8)
    entry, _, copy = run(tmp_path, make_dataset(values))
    assert not copy and "text of a removed field" in entry["left_out"]


def test_readable_text_inside_a_scan_holds_the_file_back(tmp_path: Path) -> None:
    frame = photo(False)
    planted = frame[:-2] + b"Roe Jane born 1950-02-01" + frame[-2:]
    entry, _, copy = run(tmp_path, compressed(uid.JPEGBaseline8Bit, [planted], GRAY))
    assert not copy and "readable text among its coded pixels" in entry["left_out"]


@pytest.mark.parametrize("damage", ["stream in a stream", "long segment", "rle count", "rle cut"])
def test_streams_that_cannot_be_cleaned_hold_the_file_back(tmp_path: Path, damage: str) -> None:
    syntax, frame = uid.JPEGBaseline8Bit, photo(False)
    if damage == "stream in a stream":
        frame = frame[:2] + b"\xff\xd8" + frame[2:]
    elif damage == "long segment":
        place = frame.index(b"\xff\xdb")
        length = int.from_bytes(frame[place + 2 : place + 4], "big")
        frame = frame[:place] + segment(0xDB, frame[place + 4 : place + 2 + length] + b"\0" * 65 + b"x")
    else:
        syntax, frame = uid.RLELossless, lossless(GRAY, uid.RLELossless)
        frame = (b"\2" + frame[1:]) if damage == "rle count" else frame[:-40]
    entry, _, copy = run(tmp_path, compressed(syntax, [frame], GRAY))
    assert not copy and entry["left_out"]


def test_text_burned_into_a_later_frame_is_suspected(tmp_path: Path) -> None:
    page = Image.new("L", (256, 256))
    ImageDraw.Draw(page).text((20, 20), "DOE JOHN 1901-02-03 ID 4711", fill=255)
    dark = np.zeros((256, 256), np.uint8)
    entry, _, _ = run(tmp_path, make_dataset(np.stack([dark, dark, np.asarray(page)]), NumberOfFrames=3, Modality="MR"))
    assert entry["suspicions"] == ["adjacent bright strokes, as in text, in frame 2"]


def test_a_plain_file_has_no_findings_and_keeps_its_bytes(tmp_path: Path) -> None:
    entry, data, copy = run(tmp_path, make_dataset(DEEP, BitsStored=12))
    assert entry["in_pixels"] == {}
    assert pydicom.dcmread(io.BytesIO(copy)).PixelData == pydicom.dcmread(io.BytesIO(data)).PixelData


def test_inspecting_reports_the_pixel_field_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = photo(False, comment=RECORD)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x").write_bytes(to_bytes(compressed(uid.JPEGBaseline8Bit, [frame], GRAY)))
    deid.main([str(tmp_path / "in")])
    printed = capsys.readouterr().out
    assert "1 files hold more than pixels in the pixel field\n         1 removed  JPEG comment" in printed


STREAMS = {
    "jpeg": lambda frame, found: clean_jpeg(frame, found, is_ls=False),
    "jpeg-ls": lambda frame, found: clean_jpeg(frame, found, is_ls=True),
    "jpeg 2000": clean_jpeg2000,
    "rle": lambda frame, found: clean_rle(frame, found, num_values=GRAY.size, num_segments=1),
}
WHOLE = {
    "jpeg": photo(True, comment=RECORD),
    "jpeg-ls": lossless(GRAY, uid.JPEGLSLossless),
    "jpeg 2000": lossless(GRAY, uid.JPEG2000Lossless),
    "rle": lossless(GRAY, uid.RLELossless),
}


@pytest.mark.parametrize("kind", STREAMS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cleaning_of_changed_streams_ends(kind: str, data: st.DataObject) -> None:
    frame = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(frame) - 1, 400)) | st.integers(0, len(frame) - 1))
        frame[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        # A copy in which the second pass finds something is held back.
        passes = [bytes(frame)]
        while len(passes) < 6 and (cleaned := STREAMS[kind](passes[-1], found := Counter())) != passes[-1]:
            passes.append(cleaned)
    except (PixelsHeldBack, IndexError, struct.error):  # the caller turns the latter two into named errors
        return
    assert len(passes) < 6 and not found


@pytest.mark.parametrize("kind", ["jpeg", "jpeg 2000", "rle"])
def test_truncated_frames_are_named_errors(kind: str) -> None:
    syntax = {"jpeg": uid.JPEGBaseline8Bit, "jpeg 2000": uid.JPEG2000Lossless, "rle": uid.RLELossless}[kind]
    values = np.stack([GRAY] * 3, axis=-1) if kind == "jpeg" else GRAY
    for end in range(2, 120, 7):
        dataset = pydicom.dcmread(io.BytesIO(to_bytes(compressed(syntax, [WHOLE[kind][:end]], values))))
        with pytest.raises(DataError):
            check_copy(dataset, dataset, clean_pixel_field(dataset), frozenset())
