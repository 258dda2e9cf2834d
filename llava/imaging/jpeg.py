"""Large JPEG images at a half, a quarter or an eighth of their size: libjpeg leaves out what is not needed.

    size of the file, size the model needs --choose_scale--> 1, 2, 4 or 8 --shrink--> what `Image.load` will decode

Only where it was asked for (`--fast_jpeg`): the outcome differs a little from that of the whole image, so the setting
is part of the image fingerprint. `MARGINS` are what keeps the difference small: the model's own bicubic resizing still
shrinks the image to a half at least, which hides how the coarse image was made. Nothing else is ever scaled: other
formats, CMYK, color that is coarser in one direction than in the other (4:2:2: its scaled colors are off by more),
and images that are turned by their EXIF orientation are decoded whole.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from PIL.JpegImagePlugin import get_sampling

from llava.imaging.anyres import Size
from llava.utils.cli import parse_bool

if TYPE_CHECKING:
    from PIL import Image

VERSION = 1
"""Of the rules here. Another version may give other pixels, so it is part of the image fingerprint."""

MARGINS = {8: 2.5, 4: 2.0, 2: 2.0}
"""Divisors of width and height that libjpeg has its own transforms for, and how many pixels in each direction an image
at that scale has at least for one that the model needs. Measured by benchmarks/data_loading.py: with less, edges of
strong contrast differ by more than 6 gray levels."""

EVEN_SAMPLINGS = (0, 2)
"""Pillow's numbers for 4:4:4 and 4:2:0: colors as fine as the brightness, or half as fine in both directions."""

HELP = (
    "decode JPEG images at least four times as large as the model needs at 1/2, 1/4 or 1/8: faster, and off by a "
    "few gray levels; no effect with image modes keep and anyres; default: the checkpoint's own"
)


def add_fast_jpeg_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Register `--fast-jpeg`: on, off, or (None) as the checkpoint says."""
    parser.add_argument(
        "--fast-jpeg",
        type=parse_bool,
        nargs="?",
        const=True,
        default=None,
        metavar="BOOL",
        help=HELP.replace("%", "%%"),
    )


def choose_scale(size: Size, needed: Size) -> int:
    """Return the largest divisor that leaves `MARGINS` times the needed width and height; 1 where none does.

    Args:
        size: width and height of the file's image.
        needed: width and height of that image once the model's preprocessing has resized it.
    """
    pairs = list(zip(size, needed, strict=True))
    fitting = (scale for scale, margin in MARGINS.items() if all(have >= margin * scale * need for have, need in pairs))
    return next(fitting, 1)


def can_shrink(image: Image.Image) -> bool:
    """Say whether an opened, not yet decoded image is one that may be scaled."""
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return False
    if image.mode == "RGB" and get_sampling(image) not in EVEN_SAMPLINGS:
        return False
    try:
        return bool(image.getexif().get(0x0112, 1) == 1)
    except Exception:  # unreadable metadata turns nothing, see `images`
        return True


def shrink(image: Image.Image, scale: int) -> int:
    """Have an opened image decoded at `1 / scale` and return the divisor that its decoder takes."""
    width, height = image.size
    if scale == 1:
        return 1
    image.draft(None, (width // scale, height // scale))
    # Its sides are rounded up, so that all of the image is there.
    return scale if image.size == (-(-width // scale), -(-height // scale)) else round(width / image.size[0])
