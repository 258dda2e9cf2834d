"""Images of requests: kinds, limits, and what is never opened."""

from __future__ import annotations

import base64
import io
import socket
import struct
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from llava.errors import ConfigError, DataError
from llava.imaging.decode import decode_image
from llava.imaging.dicom.policy import DicomPolicy
from llava.serve.failures import RequestError
from llava.serve.image_inputs import ImageLimits, _pinned_request, read_image, read_images
from llava.serve.messages import ImageInput
from tests.support import file_server
from tests.support.dicom_files import make, make_dataset, to_bytes


def encoded(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


def image_bytes(form: str, size: tuple[int, int] = (6, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(stream, form)
    return stream.getvalue()


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def code_of(url: str, limits: ImageLimits | None = None, *, is_bare: bool = False, **fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        read_image(ImageInput(url, **fields), limits or ImageLimits(), is_bare=is_bare)
    assert url[30:60] not in str(caught.value) or len(url) < 60
    return caught.value.code


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_kinds_are_known_by_content_whatever_the_uri_says(form: str) -> None:
    data = image_bytes(form)
    assert read_image(ImageInput(encoded(data, "data:application/dicom;base64,")), ImageLimits()) == data
    assert read_image(ImageInput(encoded(data, "DATA:;BASE64,")), ImageLimits()) == data
    trailing = data + b"more after the end"
    assert read_image(ImageInput(encoded(trailing)), ImageLimits()) == trailing


def test_base64_of_the_old_protocol_may_have_no_head() -> None:
    data = image_bytes("PNG")
    for url in (encoded(data), encoded(data, "")):
        assert read_image(ImageInput(url), ImageLimits(), is_bare=True) == data


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,%%%%", "bad_base64"),
        ("data:image/png;base64,AAA", "bad_base64"),
        ("data:image/png,AAAA", "bad_base64"),
        (encoded(b""), "bad_image"),
        (encoded(b"no image at all"), "bad_image"),
        (encoded(image_bytes("GIF")), "bad_image"),
        (encoded(image_bytes("BMP")), "bad_image"),
        (encoded(image_bytes("PNG")[:20]), "bad_image"),
        (encoded(huge_png()), "image_too_large"),
        ("", "image_url_not_allowed"),
        ("/etc/passwd", "image_url_not_allowed"),
        ("file:///etc/passwd", "image_url_not_allowed"),
        ("http://127.0.0.1:1/a.png", "image_url_not_allowed"),
        ("https://example.org/a.png", "image_url_not_allowed"),
        ("ftp://example.org/a.png", "image_url_not_allowed"),
    ],
)
def test_refused_images(url: str, code: str) -> None:
    assert code_of(url) == code


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://127.0.0.1/a.png", "%%%", "data:image/png,AAAA"])
def test_the_old_protocol_takes_base64_only(url: str) -> None:
    assert code_of(url, ImageLimits(url_prefixes=("http://127.0.0.1/",)), is_bare=True) == "bad_base64"


def test_too_many_images_are_refused_before_they_are_read() -> None:
    with pytest.raises(RequestError) as caught:
        read_images([ImageInput("%%")] * 3, ImageLimits(max_images=2))
    assert caught.value.code == "too_many_images"


def test_the_limit_of_pixels_is_checked_on_the_header() -> None:
    assert code_of(encoded(image_bytes("PNG", (20, 20))), ImageLimits(max_pixels=399)) == "image_too_large"
    assert read_image(ImageInput(encoded(image_bytes("PNG", (20, 20)))), ImageLimits(max_pixels=400))
    large = make_dataset(np.zeros((4, 4), np.uint16))
    large.Rows = large.Columns = 50_000
    assert code_of(encoded(to_bytes(large))) == "image_too_large"


def test_what_looks_like_a_bare_data_set_is_opened_as_nothing_else() -> None:
    # A header of TGA, of 9,000 x 9,000 pixels, whose origin of 8, 16 is the next field of a data set.
    header = struct.pack("<BBBHHBHHHHBB", 8, 0, 10, 0, 0, 0, 8, 16, 9_000, 9_000, 24, 0)
    data = header + bytes(8) + b"\xff\0\0\0" * 20
    assert Image.open(io.BytesIO(data)).format == "TGA"
    assert code_of(encoded(data)) == "bad_image"
    with pytest.raises(DataError, match="no fields that describe an image"):
        decode_image(data)


def test_a_start_of_jpeg_does_not_open_another_format() -> None:
    photo = bytearray(b"\xff\xd8\xff".ljust(6144, b"\0"))
    photo[2048:2052] = b"PCD_"
    assert Image.open(io.BytesIO(photo)).format == "PCD"
    assert code_of(encoded(bytes(photo))) == "bad_image"


@pytest.mark.parametrize("rows", [None, 0])
def test_a_dicom_file_without_a_size_is_no_image(rows: int | None) -> None:
    dataset = make_dataset(np.zeros((4, 4), np.uint16))
    dataset.Rows = rows
    assert code_of(encoded(to_bytes(dataset))) == "bad_image"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "::ffff:a9fe:a9fe", "fe80::1%1"],
)
def test_names_of_this_machine_are_not_fetched(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 80))])
    with pytest.raises(ValueError, match="this machine"):
        _pinned_request(urlsplit("http://pacs.example/a.png"))


def test_the_address_that_was_checked_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("2001:db8::7", 80))])
    request = _pinned_request(urlsplit("http://pacs.example/a.png"))
    assert request["url"] == "http://[2001:db8::7]:80/a.png" and request["headers"]["Host"] == "pacs.example"


def test_a_window_of_its_own_gives_the_pixels_of_that_window() -> None:
    data = make(np.arange(64, dtype=np.uint16).reshape(8, 8), WindowCenter=32, WindowWidth=64)
    found = read_image(ImageInput(encoded(data), window="20,10"), ImageLimits())
    expected = decode_image(data, dicom=DicomPolicy(window="20,10")).image
    assert found.startswith(b"\x89PNG") and np.array_equal(np.asarray(decode_image(found).image), np.asarray(expected))
    assert read_image(ImageInput(encoded(data)), ImageLimits()) == data


def test_a_frame_that_does_not_exist_is_an_invalid_value() -> None:
    data = make(np.zeros((2, 8, 8), np.uint16), NumberOfFrames=2)
    assert code_of(encoded(data), frame="5") == "invalid_value"


@pytest.fixture
def shared_folder(tmp_path: Path) -> Path:
    """A folder with `a b.png`, a link out of it, and `secret.png` beside it."""
    folder, outside = tmp_path / "images", tmp_path / "secret.png"
    folder.mkdir()
    for path in (folder / "a b.png", outside):
        path.write_bytes(image_bytes("PNG"))
    (folder / "link.png").symlink_to(outside)
    return folder


def test_a_file_of_the_image_folder(shared_folder: Path) -> None:
    limits = ImageLimits(folder=shared_folder)
    content = (shared_folder / "a b.png").read_bytes()
    assert read_image(ImageInput(f"file://{shared_folder}/a%20b.png"), limits) == content


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("file://{}/../secret.png", "image_url_not_allowed"),
        ("file://{}/link.png", "image_url_not_allowed"),
        ("file:///etc/hostname", "image_url_not_allowed"),
        ("file://host{}/a.png", "image_url_not_allowed"),
        ("file://{}/none.png", "bad_image"),
    ],
)
def test_other_files_are_refused(shared_folder: Path, url: str, code: str) -> None:
    assert code_of(url.format(shared_folder), ImageLimits(folder=shared_folder)) == code


def test_only_urls_under_a_prefix_are_fetched_and_no_redirect_is_followed() -> None:
    data = image_bytes("PNG")
    with file_server.serve() as server:
        server.files.update({"/open/a.png": data, "/open/moved.png": data, "/b.png": data})
        server.faults["/open/moved.png"] = [file_server.Fault(302, headers=(("Location", "/b.png"),))]
        limits = ImageLimits(url_prefixes=(f"{server.address}/open/",))
        assert read_image(ImageInput(f"{server.address}/open/a.png"), limits) == data
        assert code_of(f"{server.address}/open/none.png", limits) == "bad_image"
        assert code_of(f"{server.address}/open/moved.png", limits) == "bad_image"
        for path in ("/b.png", "/open/../b.png", "/open/%2e%2e/b.png", "/open/%252e%252e/b.png", "/openly.png"):
            assert code_of(server.address + path, limits) == "image_url_not_allowed"
        host = server.address.removeprefix("http://")
        assert code_of(f"http://user@{host}/open/a.png", limits) == "image_url_not_allowed"
        assert code_of(f"{server.address}/open/a.png", ImageLimits(max_bytes=10, url_prefixes=limits.url_prefixes))
        assert [request.path for request in server.log].count("/b.png") == 0


def test_a_refused_url_opens_no_connection() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        assert code_of(f"http://127.0.0.1:{listener.getsockname()[1]}/a.png") == "image_url_not_allowed"
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    "prefix", ["ftp://a/", "https://a.org", "https://user@a.org/", "https://a.org/?q=1", "a.org/x"]
)
def test_wrong_prefixes(prefix: str) -> None:
    with pytest.raises(ConfigError, match="--allow-image-url"):
        ImageLimits(url_prefixes=(prefix,))
