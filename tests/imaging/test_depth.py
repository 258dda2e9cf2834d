"""Images of more than 8 bits: equal gray levels for gray and color, for both polarities, or a named refusal."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from llava.errors import DataError
from llava.imaging import decode
from tests.support.image_files import png_bytes, tiff_bytes

SCAN = np.random.default_rng(1).integers(0, 3000, (13, 11)).astype(np.uint16)
"""A scan of 12 bits in 16."""


def levels(values: NDArray[Any]) -> NDArray[Any]:
    """Return values windowed from the smallest to the largest of all."""
    low, high = float(values.min()), float(values.max())
    return np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8)


def shown(data: bytes) -> NDArray[Any]:
    return np.asarray(decode.load_image(data))


def color(channels: int) -> NDArray[np.uint16]:
    """Return `[H, W, C]` samples of different channels."""
    return np.stack([SCAN[::-1], SCAN, SCAN[:, ::-1], SCAN // 2][:channels], axis=-1)


def ppm_bytes(values: NDArray[np.uint16]) -> bytes:
    return b"P6\n%d %d\n4095\n" % (values.shape[1], values.shape[0]) + values.astype(">u2").tobytes()


DEEP_COLOR = {
    "png rgb": png_bytes,
    "png rgb interlaced": lambda values: png_bytes(values, interlaced=True),
    "png rgba": lambda values: png_bytes(np.concatenate((values, values[..., :1] * 20), axis=2)),
    "tiff rgb little-endian": lambda values: tiff_bytes(values, photometric=2),
    "tiff rgb big-endian": lambda values: tiff_bytes(values, photometric=2, order=">"),
    "tiff rgb deflate": lambda values: tiff_bytes(values, photometric=2, deflate=True),
    "tiff rgb deflate big-endian": lambda values: tiff_bytes(values, photometric=2, deflate=True, order=">"),
    "tiff rgba": lambda values: tiff_bytes(np.concatenate((values, values[..., :1] * 20), axis=2), photometric=2),
    "tiff planes": lambda values: tiff_bytes(values, photometric=2, planes=True),
    "tiff planes big-endian": lambda values: tiff_bytes(values, photometric=2, planes=True, order=">"),
    "ppm": ppm_bytes,
}


@pytest.mark.parametrize("form", DEEP_COLOR)
def test_deep_color_is_windowed_over_all_channels(form: str) -> None:
    assert np.array_equal(shown(DEEP_COLOR[form](color(3))), levels(color(3)))


@pytest.mark.parametrize("form", DEEP_COLOR)
def test_gray_stored_as_deep_color_looks_like_gray(form: str) -> None:
    gray = np.stack([SCAN] * 3, axis=-1)
    assert np.array_equal(shown(DEEP_COLOR[form](gray)), shown(png_bytes(SCAN[..., None])))


@pytest.mark.parametrize("interlaced", [False, True])
def test_deep_gray_with_transparency_looks_like_gray(interlaced: bool) -> None:
    pair = np.stack((SCAN, SCAN[::-1] * 20), axis=-1)
    assert np.array_equal(shown(png_bytes(pair, interlaced=interlaced))[..., 0], levels(SCAN))


def test_orientation_is_applied_once_to_deep_color() -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(stream, "PNG", exif=exif)
    place = stream.getvalue().index(b"eXIf") - 4
    chunk = stream.getvalue()[place : place + 12 + struct.unpack(">I", stream.getvalue()[place : place + 4])[0]]
    plain = png_bytes(color(3))
    turned = shown(plain[:33] + chunk + plain[33:])
    assert np.array_equal(turned, np.rot90(shown(plain), -1))


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (SCAN, {}),
        (SCAN, {"order": ">"}),
        (SCAN, {"deflate": True}),
        (SCAN, {"bits": 12}),
        (SCAN.astype(np.float32), {}),
        (SCAN.astype(np.float32), {"order": ">"}),
        (SCAN.astype(np.int32) - 1500, {}),
        (SCAN.astype(np.int16) - 1500, {}),
    ],
    ids=["16", "16 big-endian", "16 deflate", "12", "float", "float big-endian", "signed 32", "signed 16"],
)
def test_white_is_zero_is_the_negative_of_black_is_zero(values: NDArray[Any], options: dict[str, Any]) -> None:
    expected = 255 - levels(values.astype(np.float64))
    assert np.array_equal(shown(tiff_bytes(values, photometric=0, **options))[..., 0], expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 8])
def test_white_is_zero_of_few_bits_is_inverted_once(bits: int, order: str) -> None:
    values = (SCAN % 2 if bits == 1 else SCAN % 256).astype(np.uint8)
    expected = 255 - values * (255 if bits == 1 else 1)
    assert np.array_equal(shown(tiff_bytes(values, photometric=0, bits=bits, order=order))[..., 0], expected)


def test_twelve_bits_are_windowed() -> None:
    assert np.array_equal(shown(tiff_bytes(SCAN, photometric=1, bits=12))[..., 0], levels(SCAN))


def jpeg2000_bytes() -> bytes:
    """Return the head of a JPEG 2000 file of three channels of 12 bits; only its header is read."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(stream, "JPEG2000", no_jp2=True)
    place = stream.getvalue().index(b"\xff\x51") + 40
    data = bytearray(stream.getvalue())
    data[place : place + 9 : 3] = b"\x0b" * 3
    return bytes(data)


def sgi_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(stream, "SGI", bpc=1)
    return stream.getvalue()[:3] + b"\2" + stream.getvalue()[4:] * 2


def fits_bytes(bits: int, kind: str) -> bytes:
    """Return a FITS file of gray values; negative bits are floating point."""
    cards = ["SIMPLE  =                    T", f"BITPIX  = {bits:>20}", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                   24", "NAXIS2  =                   16", "END"]
    values = np.arange(384).reshape(16, 24) % 256 if bits == 8 else np.arange(384).reshape(16, 24) * 7
    return "".join(card.ljust(80) for card in cards).encode().ljust(2880) + values.astype(kind).tobytes().ljust(5760)


def test_fits_of_eight_bits_is_read() -> None:
    """Its rows are stored from the bottom to the top."""
    shown = np.asarray(decode.load_image(fits_bytes(8, "u1")).convert("L"))
    assert np.array_equal(shown[::-1].ravel(), np.arange(384) % 256)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (fits_bytes(16, ">i2"), "gray of more than 8 bits as FITS"),
        (fits_bytes(32, ">i4"), "gray of more than 8 bits as FITS"),
        (fits_bytes(-32, ">f4"), "gray of more than 8 bits as FITS"),
        (fits_bytes(-64, ">f8"), "gray of more than 8 bits as FITS"),
        (jpeg2000_bytes(), "more than 8 bits as JPEG 2000"),
        (sgi_bytes(), "more than 8 bits as SGI"),
        (b"P3\n1 1\n4095\n1 2 3\n", "more than 8 bits as PPM in plain text"),
        (tiff_bytes(color(3), photometric=2, planes=True, deflate=True), "as compressed TIFF in planes"),
        (tiff_bytes(color(4), photometric=5), "as TIFF CMYK"),
        (tiff_bytes(SCAN.astype(np.float64), photometric=1), r"its kind of TIFF \(bits, byte order, colors\)"),
    ],
    ids=[
        "fits",
        "fits 32",
        "fits float",
        "fits double",
        "jpeg 2000",
        "sgi",
        "plain ppm",
        "compressed planes",
        "cmyk",
        "64 bits",
    ],
)
def test_deep_images_that_cannot_be_read_whole_are_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        decode.load_image(data)
    assert str(caught.value).startswith("image given as bytes") and "\n" not in str(caught.value)
