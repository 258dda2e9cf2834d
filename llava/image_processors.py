"""Image processors: transformers' exact PIL ones, and the one rule that open_clip has and they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import AutoImageProcessor, CLIPImageProcessorPil

FILE_NAME = "preprocessor_config.json"
"""Settings of an image processor, in a tower's folder and beside a model's weights."""


class OpenClipImageProcessorPil(CLIPImageProcessorPil):
    """open_clip's transform for evaluation: shortest side resized (bicubic), square cut out of the middle, normalised.

    CLIP's processor does the same but for the middle of an odd rest: open_clip rounds half a pixel to the even side,
    CLIP always down. A quarter of all films would be shifted by a pixel against what the tower was trained on.
    """

    def center_crop(self, image: np.ndarray, size: Any, *_: Any, **__: Any) -> np.ndarray:
        """Cut the middle out of `image` [3, H, W], which is at least as large as `size`."""
        top = round((image.shape[1] - size.height) / 2)
        left = round((image.shape[2] - size.width) / 2)
        return image[:, top : top + size.height, left : left + size.width]


OWN_PROCESSORS: dict[str, type[CLIPImageProcessorPil]] = {"OpenClipImageProcessor": OpenClipImageProcessorPil}
"""Processors that transformers does not know, by the type in their files (the class without `Pil`)."""


def load_image_processor(path: str | Path) -> Any:
    """The image processor of a folder (or hub name) in its exact PIL form.

    Raises:
        OSError, ValueError: it cannot be read; callers say where it was expected.
    """
    file = Path(path) / FILE_NAME
    own = None
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        own = OWN_PROCESSORS.get(str(settings.get("image_processor_type")))
    if own is not None:
        return own.from_pretrained(path)
    return cast(Any, AutoImageProcessor).from_pretrained(path, backend="pil")
