"""Decode large JPEG images at 1/2, 1/4 or 1/8 of their size, with the scaled transforms of libjpeg.

    size of the file, size the model needs --choose_scale--> 1, 2, 4 or 8 --shrink--> what `Image.load` will decode

Used only with `--fast-jpeg`: pixels differ slightly from those of full decoding, so the setting is part of the image
fingerprint. `MARGINS` keeps the difference small: bicubic resizing still shrinks the image to at most a half, which
hides artifacts of the scaled transforms. Other formats, CMYK, chroma subsampling in one direction only (4:2:2, whose
scaled colors differ more) and images with an EXIF rotation are decoded at full size.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from PIL.JpegImagePlugin import get_sampling

from llava.imaging.anyres import Size
from llava.utils.cli import parse_bool

if TYPE_CHECKING:
    from PIL import Image

JPEG_SCALE_VERSION = 1
"""Version of the rules here. Versions may give different pixels, so it is part of the image fingerprint."""

MARGINS = {8: 2.5, 4: 2.0, 2: 2.0}
"""Divisors of width and height that libjpeg supports, and the smallest ratio of the scaled size to the size that the
model needs. Measured by benchmarks/data_loading.py: with less, edges of strong contrast differ by more than 6 gray
levels."""

EVEN_SAMPLINGS = (0, 2)
"""Pillow's codes for 4:4:4 and 4:2:0: chroma at full resolution, or halved in both directions."""

FAST_JPEG_HELP = (
    "decode JPEG images at least four times as large as the model needs at 1/2, 1/4 or 1/8: faster, with pixels that "
    "differ by a few gray levels; no effect with image modes keep and anyres; default: that of the checkpoint"
)


def add_fast_jpeg_option(parser: argparse._ActionsContainer) -> None:
    """Register `--fast-jpeg`: true, false, or None for the setting of the checkpoint."""
    parser.add_argument(
        "--fast-jpeg",
        type=parse_bool,
        nargs="?",
        const=True,
        default=None,
        metavar="BOOL",
        help=FAST_JPEG_HELP.replace("%", "%%"),
    )


def choose_scale(size: Size, needed: Size) -> int:
    """Return the largest divisor that leaves `MARGINS` times the needed width and height, or 1.

    Args:
        size: width and height of the image in the file.
        needed: width and height of the image after the model's preprocessing has resized it.
    """
    pairs = list(zip(size, needed, strict=True))
    fitting = (scale for scale, margin in MARGINS.items() if all(have >= margin * scale * need for have, need in pairs))
    return next(fitting, 1)


def can_shrink(image: Image.Image) -> bool:
    """Return whether an opened, not yet decoded image may be scaled."""
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return False
    if image.mode == "RGB" and get_sampling(image) not in EVEN_SAMPLINGS:
        return False
    try:
        return bool(image.getexif().get(0x0112, 1) == 1)
    except Exception:  # unreadable metadata is ignored, as in `decode`
        return True


def shrink_on_decode(image: Image.Image, scale: int) -> int:
    """Set an opened image to be decoded at `1 / scale`; return the divisor that the decoder uses."""
    width, height = image.size
    if scale == 1:
        return 1
    image.draft(None, (width // scale, height // scale))
    # Sides are rounded up, so that no part of the image is lost.
    return scale if image.size == (-(-width // scale), -(-height // scale)) else round(width / image.size[0])
