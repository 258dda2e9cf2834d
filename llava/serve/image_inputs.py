"""Images of requests: from the text of a client to the bytes of an image file, within limits.

    data: URI or base64 --decode--> bytes --kind by content, header: size--> bytes for the engine
    https: URL under --allow-image-url, file: URL under --image-folder --read--> the same

Every other URL is refused before anything is opened.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import httpx2
from PIL import Image

from llava.data.download.url_policy import redacted_url, url_origin
from llava.errors import ConfigError, DataError, DownloadError, LlavaError, MissingDependency
from llava.imaging.decode import decode_image, read_image_bytes
from llava.imaging.depth import TIFF_STARTS, open_stored
from llava.imaging.dicom.header import integer_value, read_header
from llava.imaging.dicom.policy import DEFAULT_POLICY, DicomPolicy
from llava.imaging.dicom.sniff import is_dicom, may_be_bare
from llava.imaging.geometry import MAX_PIXELS
from llava.serve.addresses import is_address, reached_addresses
from llava.serve.failures import RequestError
from llava.serve.messages import ImageInput
from llava.utils.cli import check_folder

DATA_URI = re.compile(r"data:[^,]{0,200}?;base64,", re.IGNORECASE)
FETCH_SECONDS = 10.0
"""Largest time that fetching an image from a URL takes."""

KINDS = "PNG, JPEG, WebP, TIFF or DICOM"
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF")
"""Pillow's names of these kinds; MPO is a JPEG file of several images."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of the images of a request.

    Attributes:
        max_images: largest number of images.
        max_pixels: largest number of pixels of an image, checked before decoding.
        max_bytes: largest size of a fetched file.
        url_prefixes: URLs under which images may be fetched.
        folder: folder whose files may be named by `file:` URLs.
        dicom: window and frame of DICOM files where a request names none.
    """

    max_images: int = 16
    max_pixels: int = MAX_PIXELS
    max_bytes: int = 32 << 20
    url_prefixes: tuple[str, ...] = ()
    folder: Path | None = None
    dicom: DicomPolicy = DEFAULT_POLICY

    def __post_init__(self) -> None:
        if self.max_images < 0:
            raise ConfigError(f"--max-images is {self.max_images}; expected at least 0")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise ConfigError(f"--max-pixels is {self.max_pixels}; expected 1 to {MAX_PIXELS}")
        for prefix in self.url_prefixes:
            check_prefix(prefix)
        check_folder(self.folder, "--image-folder")


def read_images(images: Sequence[ImageInput], limits: ImageLimits, *, is_bare: bool = False) -> tuple[bytes, ...]:
    """Return the file bytes of the images of a request.

    Args:
        images: images as sent.
        limits: what is allowed.
        is_bare: whether base64 without a `data:` head is an image, as in the old protocol.

    Raises:
        RequestError: there are too many, or one of them is refused.
    """
    if len(images) > limits.max_images:
        raise RequestError("too_many_images", f"{len(images)} images; at most {limits.max_images} are allowed")
    return tuple(read_image(image, limits, is_bare=is_bare) for image in images)


def read_image(image: ImageInput, limits: ImageLimits, *, is_bare: bool = False) -> bytes:
    """Return the file bytes of one image.

    A DICOM file with its own window or frame is rendered to PNG.

    Raises:
        RequestError: it is refused; the code says why.
    """
    data = _content(image, limits, is_bare)
    try:
        if not (_known_start(data) or _is_dicom(data)):
            raise _unknown_kind(image)
        _check_size(data, image, limits.max_pixels)
        if (image.window, image.frame) != (None, None) and _is_dicom(data):
            return _rendered(data, limits.dicom.changed(image.window, image.frame))
    except MissingDependency as error:
        raise RequestError("bad_image", str(error), param=image.param) from error
    except LlavaError as error:
        raise refused_image(error, image.param) from error
    return data


def refused_image(error: LlavaError, param: str | None = None) -> RequestError:
    """Return the error of a request for an image that cannot be decoded."""
    if isinstance(error, RequestError):
        return error
    text = str(error)
    if "of --dicom-frame does not exist" in text:
        return RequestError("invalid_value", text.replace("of --dicom-frame ", ""), param=param)
    code = "image_too_large" if "more than the limit of" in text else "bad_image"
    return RequestError(code, text, param=param)


def _content(image: ImageInput, limits: ImageLimits, is_bare: bool) -> bytes:
    head = DATA_URI.match(image.url)
    if head is not None or (is_bare and ":" not in image.url[:200]):
        return _from_base64(image.url[head.end() if head else 0 :], image.param)
    if image.url[:5].lower() == "data:":
        raise RequestError("bad_base64", "a data: URI must be base64 (data:image/png;base64,...)", param=image.param)
    if is_bare:
        raise RequestError("bad_base64", "an image must be base64, with or without a data: head", param=image.param)
    scheme = image.url.partition(":")[0].lower()
    if scheme == "file" and limits.folder is not None:
        return _from_folder(image, limits.folder)
    if scheme in ("http", "https") and any(_is_under(image.url, prefix) for prefix in limits.url_prefixes):
        return _fetched(image, limits)
    raise _not_allowed(image)


def _not_allowed(image: ImageInput) -> RequestError:
    return RequestError(
        "image_url_not_allowed",
        "images are sent as data: URIs; this server does not open other URLs",
        param=image.param,
    )


def _from_base64(text: str, param: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("bad_base64", "the image is not valid base64", param=param) from None


def _is_dicom(data: bytes) -> bool:
    return is_dicom(data) or may_be_bare(data)


def _known_start(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", *TIFF_STARTS))


def _unknown_kind(image: ImageInput) -> RequestError:
    return RequestError("bad_image", f"the image is not {KINDS}", param=image.param)


def _check_size(data: bytes, image: ImageInput, limit: int) -> None:
    """Raise `RequestError` for an image that its header declares too large; nothing is decoded."""
    try:
        width, height = _declared_size(data, image)
    except Image.DecompressionBombError:
        raise RequestError("image_too_large", f"the image has more than {limit} pixels", param=image.param) from None
    except LlavaError:
        raise
    except Exception as error:  # decoders raise exceptions of any type, with messages that may quote the file
        text = f"the image cannot be decoded: its header is damaged ({type(error).__name__})"
        raise RequestError("bad_image", text, param=image.param) from None
    if width * height > limit:
        raise RequestError(
            "image_too_large",
            f"the image has {width} x {height} pixels; at most {limit} are allowed",
            param=image.param,
        )


def _declared_size(data: bytes, image: ImageInput) -> tuple[int, int]:
    if not _is_dicom(data):
        with open_stored(data)[0] as opened:
            if opened.format not in FORMATS:  # Pillow has formats that may begin with anything
                raise _unknown_kind(image)
            return opened.size
    dataset = read_header(data, ("Rows", "Columns"), name="given as bytes", pixels=False)
    try:
        width, height = integer_value(dataset, "Columns"), integer_value(dataset, "Rows")
    except DataError as error:
        raise DataError(f"image given as bytes {error}") from None
    if width < 1 or height < 1:
        raise DataError(f"image given as bytes is empty ({width} x {height} pixels)")
    return width, height


def _rendered(data: bytes, policy: DicomPolicy) -> bytes:
    """Return a DICOM file rendered with a policy as PNG, whose pixels are the same."""
    stream = io.BytesIO()
    decode_image(data, dicom=policy).image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def _from_folder(image: ImageInput, folder: Path) -> bytes:
    try:
        parts = urlsplit(image.url)
        if parts.netloc not in ("", "localhost"):
            raise _not_allowed(image)
        path = folder / unquote(parts.path, errors="strict")
        if not Path(path).resolve().is_relative_to(folder.resolve()):
            raise _not_allowed(image)
        return read_image_bytes(path.resolve(), folder)
    except (DataError, ValueError, OSError):
        # Without the name and the reason: a request must not find out which files exist.
        raise RequestError("bad_image", "the file cannot be read as an image", param=image.param) from None


def check_prefix(prefix: str) -> None:
    """Check a value of --allow-image-url.

    Raises:
        ConfigError: it is not an http(s) URL with a path.
    """
    try:
        url_origin(prefix)
    except DownloadError as error:
        raise ConfigError(
            f"--allow-image-url: {error}; expected a URL such as https://pacs.example.org/thumbs/"
        ) from None
    parts = urlsplit(prefix)
    if parts.query or parts.fragment or "@" in parts.netloc or not parts.path.startswith("/"):
        raise ConfigError(f"--allow-image-url {redacted_url(prefix)}: expected scheme, host and a path, and no more")


def _is_under(url: str, prefix: str) -> bool:
    try:
        origin, parts, wanted = url_origin(url), urlsplit(url), urlsplit(prefix)
    except (DownloadError, ValueError):
        return False
    if "@" in parts.netloc or parts.fragment or (parts.scheme, origin) != (wanted.scheme, url_origin(prefix)):
        return False
    # A path that servers may normalize could leave the prefix.
    segments = unquote(unquote(parts.path)).replace("\\", "/").split("/")
    return ".." not in segments and "." not in segments and parts.path.startswith(wanted.path)


def _fetched(image: ImageInput, limits: ImageLimits) -> bytes:
    """Return the file at an allowed URL: one request to the address that was checked, without redirects."""
    parts = urlsplit(image.url)
    failure = RequestError("bad_image", "the image cannot be fetched from its URL", param=image.param)
    try:
        request = _pinned_request(parts)
        deadline = time.monotonic() + FETCH_SECONDS
        # Neither proxies nor credentials of the environment: the address that was checked is the one that is opened.
        client = httpx2.Client(follow_redirects=False, timeout=FETCH_SECONDS, trust_env=False)
        with client, client.stream("GET", **request) as response:
            if response.status_code != 200:
                raise failure
            content = bytearray()
            for piece in response.iter_bytes():
                content += piece
                if len(content) > limits.max_bytes or time.monotonic() > deadline:
                    raise failure
            return bytes(content)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError):
        raise failure from None


def _pinned_request(parts: SplitResult) -> dict[str, Any]:
    """Return the request to the resolved IP of a URL's host.

    Loopback and link-local hosts must be allowed by name.
    """
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    number = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    is_named = host == "localhost" or is_address(host)
    for address in () if is_named else reached_addresses(number):
        if address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast:
            raise ValueError("the host leads to an address of this machine")
    literal = f"[{number}]" if ":" in number else number
    return {
        "url": parts._replace(netloc=f"{literal}:{port}").geturl(),
        "headers": {"Host": parts.netloc, "Accept-Encoding": "identity"},
        "extensions": {"sni_hostname": host},
    }
