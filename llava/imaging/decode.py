"""Decode image files as RGB images; all image files are opened here.

    file bytes --load--> RGB image --fit(mode)--> input of the image processor
               --decode--> Opened (gray stays gray, may be scaled), for `llava/imaging/image_processor.py`

Policies, identical for training, evaluation and serving:

- Color: all images become RGB. Transparency is dropped, not composited, as in the published models.
- Depth: images of more than 8 bits (16-bit and 32-bit integers, floating point, 16-bit color) are windowed linearly
  from their smallest to their largest value, of all channels together, onto 0 to 255; an image of a single value
  becomes black. White-is-zero images are inverted. See `llava/imaging/depth.py`.
- Orientation: an EXIF orientation is applied, so the model sees what a viewer shows. Images without one (nearly all
  medical files) are unaffected.
- Several frames: the first one is used.
- DICOM files, detected by content: see `llava/imaging/dicom/render.py`; a `DicomPolicy` selects window and frame.
- Size: images of more than `MAX_PIXELS` are rejected before decoding. Files must be regular, of at most `MAX_BYTES`.
- Scale: images are decoded at full size, unless `decode` is asked to scale large JPEG files, see
  `llava/imaging/jpeg.py`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from llava.errors import DataError
from llava.imaging.anyres import Size
from llava.imaging.depth import TIFF_STARTS, load_pixels, open_stored
from llava.imaging.dicom.policy import DEFAULT_POLICY, DicomPolicy
from llava.imaging.dicom.sniff import is_dicom, may_be_bare
from llava.imaging.geometry import MAX_PIXELS, Box, to_rgb
from llava.imaging.jpeg import can_shrink, shrink_on_decode


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """Decoded image with its orientation applied.

    Attributes:
        image: pixels in mode L or RGB.
        size: width and height of the image at full size, in pixels.
        scale: divisor by which `image` is smaller, with sides rounded up.
    """

    image: Image.Image
    size: Size
    scale: int = 1

    @property
    def box(self) -> Box:
        """Return the part of the scaled `image` that is covered, before its sides were rounded up."""
        return (0.0, 0.0, self.size[0] / self.scale, self.size[1] / self.scale)


DECODE_VERSION = 3
"""Version of the rules of decoding. Versions may give different pixels, so it is part of the image fingerprint."""

POSTSCRIPT_STARTS = (b"%!PS", b"\xc5\xd0\xd3\xc6")

MAX_BYTES = 1 << 31
"""Largest file that is read, 2 GiB."""


def resolve_image_path(ref: str | Path, root: str | Path | None) -> Path:
    """Return the path of image `ref` in folder `root`; symbolic links are resolved before the check.

    Args:
        ref: name from a data file, relative to `root` (or absolute and inside it).
        root: image folder; None trusts `ref` as a path given by the user.

    Raises:
        DataError: the file is outside `root`, or the name is not valid.
    """
    _check_name(ref)
    if root is None:
        return Path(ref)
    folder = _real_folder(str(root))
    path = Path(os.path.realpath(folder / ref))
    if path.is_relative_to(folder):
        return path
    if Path(os.path.abspath(folder / ref)).is_relative_to(folder):
        raise DataError(
            f"image {str(ref)!r} leads outside the image folder {folder} by a symbolic link; copy the folder with "
            "links followed (cp -rL), or set an image folder above both with names relative to it"
        )
    raise DataError(f"image {str(ref)!r} leads outside the image folder {folder}; move or copy the file into it")


def _check_name(ref: str | Path) -> None:
    """Raise `DataError` for a name that no file can have."""
    # System calls report such names with other errors than that of a missing file.
    try:
        possible = b"\0" not in os.fsencode(ref)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise DataError(f"image {str(ref)!r} has an invalid name; it must not have zero bytes or unpaired surrogates")


@lru_cache(maxsize=32)
def _real_folder(root: str) -> Path:
    """Return the real path of an image folder; cached, since every image needs it."""
    return Path(os.path.realpath(root))


class IrregularFile(DataError):
    """Error: an image is a named pipe, a socket, a device or a folder."""


def read_image_bytes(ref: str | Path, root: str | Path | None) -> bytes:
    """Return the bytes of image `ref` in folder `root`.

    Raises:
        IrregularFile: the file is not a regular file.
        DataError: the file is missing, not readable, too large or outside `root`.
    """
    path = resolve_image_path(ref, root)
    try:
        with open(path, "rb", opener=_open_without_waiting) as stream:
            state = os.fstat(stream.fileno())
            if not stat.S_ISREG(state.st_mode):
                kind = "a named pipe" if stat.S_ISFIFO(state.st_mode) else "a device"
                raise IrregularFile(f"image {path} is {kind}; expected a regular file")
            if state.st_size > MAX_BYTES:
                raise DataError(f"image {path} has {state.st_size} bytes, more than the limit of {MAX_BYTES}")
            return stream.read()
    except OSError as error:
        if error.errno in _IRREGULAR:
            raise IrregularFile(f"image {path} is {_IRREGULAR[error.errno]}; expected a regular file") from error
        raise DataError(f"image {path} cannot be read: {error.strerror or error}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe would wait for a writer; O_NONBLOCK does not, and has no effect on regular files.
    return os.open(path, flags | os.O_NONBLOCK)


_IRREGULAR = {errno.EISDIR: "a folder", errno.ENXIO: "a socket or a device"}
"""Errors of opening files that cannot be read at all."""


def load_image(
    ref: str | Path | bytes, root: str | Path | None = None, *, dicom: DicomPolicy = DEFAULT_POLICY
) -> Image.Image:
    """Return image `ref` (a name in folder `root`, or the bytes of a file) as an RGB image.

    Example::

        image = load_image("1.png", "images")

    Args:
        ref: name or bytes.
        root: image folder; None trusts `ref` as a path given by the user.
        dicom: rendering of DICOM files.

    Raises:
        DataError: the file is missing, outside `root`, too large, damaged or truncated; the message names the file.
        MissingDependency: the decoder of a compressed DICOM file is not installed.
    """
    return to_rgb(decode_image(ref, root, dicom=dicom).image)


def decode_image(
    ref: str | Path | bytes,
    root: str | Path | None = None,
    *,
    dicom: DicomPolicy = DEFAULT_POLICY,
    scale_of: Callable[[Size], int] | None = None,
) -> DecodedImage:
    """Return image `ref` like `load_image`, but gray as one channel and optionally at a reduced scale.

    Args:
        ref: name or bytes.
        root: image folder; None trusts `ref` as a path given by the user.
        dicom: rendering of DICOM files.
        scale_of: returns the divisor (1, 2, 4 or 8) for a JPEG image of this size; None decodes at full size.

    Raises:
        DataError, MissingDependency: as `load`.
    """
    data, name = (ref, "given as bytes") if isinstance(ref, bytes) else (read_image_bytes(ref, root), str(ref))
    # First, because Pillow has formats without a mark of their own (TGA), as which it would open some bare data sets.
    if is_dicom(data) or may_be_bare(data):
        return _load_dicom(data, name, dicom)
    try:
        image, inverted = open_stored(data)
        with image:
            _check_size(image, name)
            size = image.size
            scale = shrink_on_decode(image, scale_of(size)) if scale_of is not None and can_shrink(image) else 1
            shown = _upright(image, load_pixels(image, data, inverted=inverted))
            return DecodedImage(shown, shown.size if scale == 1 else size, scale)
    except DataError as error:
        raise error if str(error).startswith("image ") else DataError(f"image {name}: {error}") from None
    except UnidentifiedImageError as error:
        kind = "its format is unknown"
        if data.startswith(TIFF_STARTS):
            kind = "its kind of TIFF (bits, byte order, colors) is not supported; convert it to PNG"
        elif data.startswith(POSTSCRIPT_STARTS):
            kind = "PostScript is a program, which is not run; convert it to PNG"
        raise DataError(f"image {name} cannot be decoded: {kind}") from error
    except Exception as error:  # decoders raise exceptions of any type: struct.error, IndexError, ...
        raise DataError(f"image {name} cannot be decoded ({type(error).__name__}: {error})") from error


def _load_dicom(data: bytes, name: str, policy: DicomPolicy) -> DecodedImage:
    from llava.imaging.dicom.render import render_frame  # pydicom is slow to import, and few images need it

    image = render_frame(data, policy, name=name, max_pixels=MAX_PIXELS)
    return DecodedImage(image, image.size)


def stored_format(data: bytes) -> str:
    """Return format and color mode of an image file as stored: `JPEG L`, `PNG I;16`, `DICOM`, `unknown`.

    Only the header is read; the file may still not decode.
    """
    if is_dicom(data) or may_be_bare(data):
        return "DICOM"
    try:
        with open_stored(data)[0] as image:
            return f"{image.format} {image.mode}"
    except Exception:  # decoders raise exceptions of any type
        return "unknown"


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"image {name} has {width} x {height} pixels, more than the limit of {MAX_PIXELS}; scale it down first"
        )
    if width < 1 or height < 1:
        raise DataError(f"image {name} is empty ({width} x {height} pixels)")


def _upright(source: Image.Image, image: Image.Image) -> Image.Image:
    """Return `image` rotated or mirrored by the EXIF orientation of `source`."""
    try:
        orientation = source.getexif().get(0x0112, 1)
    except Exception:  # unreadable metadata does not affect the pixels
        return image
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if method is None else image.transpose(method)


def content_digest(data: bytes) -> str:
    """Return the SHA-256 of the bytes of a file (64 hexadecimal digits)."""
    return hashlib.sha256(data).hexdigest()


def key_of_digest(digest: str, fingerprint: str) -> str:
    """Return the image key of file bytes given by their `content_digest`."""
    return hashlib.sha256(f"{digest}\n{fingerprint}".encode()).hexdigest()[:32]


def image_key(data: bytes, fingerprint: str) -> str:
    """Return the key of a model input, equal for equal file bytes and equal preprocessing.

    Args:
        data: bytes of the image file.
        fingerprint: hash of all preprocessing of the image (`processor.image_fingerprint`).
    """
    return key_of_digest(content_digest(data), fingerprint)
