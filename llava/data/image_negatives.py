"""Damaged images for mDPO: cropped, noisy, blank, or taken from another row.

A chosen answer should be less likely beside one of them.

key of an image --key_of(place)--> "KEY~crop~DRAW" --damaged--> image of the same size

The draw depends on seed, epoch and row only, and the key names it, so any process can make the image again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava.constants import GRAY
from llava.utils.lookup import lookup

MARK = "~"
"""Separator of the parts of a key; keys of images are hexadecimal."""

LARGEST_CROP = 0.2
"""Largest share of the image's area that a crop keeps."""

SIGNAL = 0.1
"""Share of the variance that noise leaves to the image."""


def crop(image: Image.Image, draw: random.Random) -> Image.Image:
    """Return a random part of an image, at most `LARGEST_CROP` of its area, enlarged to its size."""
    scale = (LARGEST_CROP * draw.random()) ** 0.5
    width, height = (max(1, round(scale * side)) for side in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    part = image.crop((left, top, left + width, top + height))
    return part.resize(image.size, Image.Resampling.BICUBIC)


def noise(image: Image.Image, draw: random.Random) -> Image.Image:
    """Return an image that is mostly Gaussian noise."""
    values = np.asarray(image.convert("RGB"), dtype=np.float64) / 127.5 - 1.0
    drawn = np.random.default_rng(draw.getrandbits(64)).standard_normal(values.shape)
    mixed = SIGNAL**0.5 * values + (1 - SIGNAL) ** 0.5 * drawn
    return Image.fromarray(np.round((np.clip(mixed, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8))


def blank(image: Image.Image, draw: random.Random) -> Image.Image:
    """Return a gray image of the same size."""
    return Image.new("RGB", image.size, GRAY)


DAMAGES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {"crop": crop, "noise": noise, "blank": blank}
"""Damages by name."""

CHOICES = ("none", *DAMAGES, "swap")
"""Values of `--image-negative`; `swap` takes the images of another row."""


@dataclass(frozen=True, slots=True)
class ImageNegative:
    """Kind of the damaged images of a run, and the seed of their draws."""

    kind: str
    seed: int = 0

    @property
    def varies(self) -> bool:
        """Whether the images differ between epochs."""
        return self.kind != "blank"

    def draw(self, epoch: int, row: int) -> random.Random:
        """Return the random numbers of a row in an epoch."""
        return random.Random(f"{self.seed}/{epoch}/{row}/image")

    def key_of(self, key: str, epoch: int, row: int) -> str:
        """Return the key of the damaged image of a row in an epoch."""
        if not self.varies:
            return MARK.join((key, self.kind, ""))
        drawn = hashlib.sha256(f"{self.seed}/{epoch}/{row}/{key}".encode()).hexdigest()[:16]
        return MARK.join((key, self.kind, drawn))


def split_key(key: str) -> tuple[str, tuple[str, str] | None]:
    """Return the key of the undamaged image, and the damage's kind and draw, if any."""
    whole, *damage = key.split(MARK)
    return whole, (damage[0], damage[1]) if damage else None


def damaged(image: Image.Image, kind: str, drawn: str) -> Image.Image:
    """Return an image with the damage that a key names."""
    return lookup(DAMAGES, kind, "damage of an image")(image.convert("RGB"), random.Random(drawn))
