"""Image files to RGB images: the only place that opens, converts and shapes them.

    file bytes --load--> RGB image --fit(mode)--> image the image processor can take
               --decode--> Opened (gray stays gray, perhaps scaled), for `data.pixel_path`

Policies, the same for training, evaluation and serving:

- Color: everything becomes RGB. Transparency is dropped, not composited, as the published models saw it.
- Depth: images of more than 8 bits (16-bit and 32-bit integers, floating point) are windowed linearly from their
  smallest to their largest value onto 0 to 255; an image of one single value becomes black.
- Orientation: an EXIF orientation is applied, so the model sees what a viewer shows. Images without one (nearly all
  medical files) are unaffected.
- Several frames: the first one.
- DICOM files, known by their content: see `data.dicom`; window and frame are chosen by a `DicomPolicy`.
- Size: more than `MAX_PIXELS` is refused before anything is decoded.
- Scale: images are decoded whole, unless the caller of `decode` has large JPEG files scaled, see `data.jpeg_scale`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from llava.errors import DataError
from llava.imaging.anyres import Size
from llava.imaging.dicom.policy import DEFAULT, DicomPolicy
from llava.imaging.dicom.sniff import is_dicom, may_be_bare
from llava.imaging.geometry import _plain, to_rgb
from llava.imaging.jpeg import can_shrink, shrink

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A decoded image, upright.

    Attributes:
        image: mode L or RGB.
        size: width and height of the whole image in pixels.
        scale: `image` is smaller by this divisor, its sides rounded up.
    """

    image: Image.Image
    size: Size
    scale: int = 1

    @property
    def box(self) -> Box:
        """The part of `image` that shows the image: the sides before they were rounded up."""
        return (0.0, 0.0, self.size[0] / self.scale, self.size[1] / self.scale)


MAX_PIXELS = 89_478_485
"""Largest image that is decoded (width x height): Pillow's own limit, a quarter GiB of RGB."""


def resolve(ref: str | Path, root: str | Path | None) -> Path:
    """Return the path of image `ref` in folder `root`; links are followed before the check.

    Args:
        ref: name from a data file, relative to `root` (or absolute and inside it).
        root: the image folder; None trusts `ref` as a path of the user's own.

    Raises:
        DataError: the file would lie outside `root`, or no file can have this name.
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
            "links followed (cp -rL), or give a folder above both and names relative to it"
        )
    raise DataError(f"image {str(ref)!r} leads outside the image folder {folder}; move or copy the file into it")


def _check_name(ref: str | Path) -> None:
    """Refuse what no file is called, which the system's own calls answer with other errors than a missing file's."""
    try:
        possible = b"\0" not in os.fsencode(ref)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise DataError(f"image {str(ref)!r}: no file can have this name (a zero byte, or half of a surrogate pair)")


@lru_cache(maxsize=32)
def _real_folder(root: str) -> Path:
    """Image folders are few and asked for once per image."""
    return Path(os.path.realpath(root))


def read_bytes(ref: str | Path, root: str | Path | None) -> bytes:
    """Return the bytes of image `ref` in folder `root`.

    Raises:
        DataError: the file is missing, not readable or outside `root`.
    """
    path = resolve(ref, root)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror or error}") from error


def load(ref: str | Path | bytes, root: str | Path | None = None, *, dicom: DicomPolicy = DEFAULT) -> Image.Image:
    """Return image `ref` (a name in folder `root`, or the bytes of a file) as an RGB image.

    Args:
        ref: name or bytes.
        root: the image folder; None trusts `ref` as a path of the user's own.
        dicom: how a DICOM file is shown.

    Raises:
        DataError: missing, outside `root`, too large, broken or cut off; the message names the file.
        MissingDependency: the decoder of a compressed DICOM file is not installed.
    """
    return to_rgb(decode(ref, root, dicom=dicom).image)


def decode(
    ref: str | Path | bytes,
    root: str | Path | None = None,
    *,
    dicom: DicomPolicy = DEFAULT,
    scale_of: Callable[[Size], int] | None = None,
) -> Opened:
    """Return image `ref` as `load` does, but gray as one channel and, where asked for, at a smaller scale.

    Args:
        ref: name or bytes.
        root: the image folder; None trusts `ref` as a path of the user's own.
        dicom: how a DICOM file is shown.
        scale_of: divisor for a large JPEG image of this width and height (1, 2, 4 or 8); None decodes all whole.

    Raises:
        DataError, MissingDependency: as `load`.
    """
    data, name = (ref, "given as bytes") if isinstance(ref, bytes) else (read_bytes(ref, root), str(ref))
    if is_dicom(data):
        return _load_dicom(data, name, dicom)
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image, name)
            size = image.size
            scale = shrink(image, scale_of(size)) if scale_of is not None and can_shrink(image) else 1
            image.load()
            shown = _upright(image, _plain(image))
            return Opened(shown, shown.size if scale == 1 else size, scale)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        if may_be_bare(data):
            return _load_dicom(data, name, dicom)
        raise DataError(f"image {name} cannot be decoded: it is no image of a known format") from error
    except Exception as error:  # decoders raise whatever their parsing runs into: struct.error, IndexError, ...
        raise DataError(f"image {name} cannot be decoded ({type(error).__name__}: {error})") from error


def _load_dicom(data: bytes, name: str, policy: DicomPolicy) -> Opened:
    from llava.imaging.dicom.render import picture  # pydicom takes its time to import, and most images are none

    image = picture(data, policy, name=name, max_pixels=MAX_PIXELS)
    return Opened(image, image.size)


def stored_as(data: bytes) -> str:
    """Return format and color mode of an image file as it is stored: `JPEG L`, `PNG I;16`, `DICOM`, `unknown`.

    Only the header is read; it says nothing about whether the file decodes.
    """
    if is_dicom(data):
        return "DICOM"
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.format} {image.mode}"
    except Exception:  # decoders raise whatever their parsing runs into
        return "DICOM" if may_be_bare(data) else "unknown"


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"image {name} has {width} x {height} pixels, more than {MAX_PIXELS}; scale it down first")
    if width < 1 or height < 1:
        raise DataError(f"image {name} is empty ({width} x {height} pixels)")


def _upright(source: Image.Image, image: Image.Image) -> Image.Image:
    """Return `image` turned as the EXIF data of `source` says."""
    try:
        orientation = source.getexif().get(0x0112, 1)
    except Exception:  # unreadable metadata says nothing about the pixels
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
    """Return the identity of a file's bytes (64 hexadecimal digits)."""
    return hashlib.sha256(data).hexdigest()


def key_of_digest(digest: str, fingerprint: str) -> str:
    """Return the image key for file bytes known by their `content_digest`."""
    return hashlib.sha256(f"{digest}\n{fingerprint}".encode()).hexdigest()[:32]


def image_key(data: bytes, fingerprint: str) -> str:
    """Return the identity of a model input: equal file bytes under equal preprocessing, whatever the file is called.

    Args:
        data: bytes of the image file.
        fingerprint: identity of everything that happens to the image afterwards (`processor.image_fingerprint`).
    """
    return key_of_digest(content_digest(data), fingerprint)
