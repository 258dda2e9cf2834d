"""A picture as it was decoded, and what is known of the whole one where it is smaller."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from llava.imaging.anyres import Size

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A decoded picture, upright.

    Attributes:
        image: mode L or RGB.
        size: width and height of the whole picture in pixels.
        scale: `image` is smaller by this divisor, its sides rounded up.
    """

    image: Image.Image
    size: Size
    scale: int = 1

    @property
    def box(self) -> Box:
        """The part of `image` that shows the picture: the sides before they were rounded up."""
        return (0.0, 0.0, self.size[0] / self.scale, self.size[1] / self.scale)
