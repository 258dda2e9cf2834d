"""Thin images: bounded memory in every image mode, with the pixels of full resizing, or a refusal with the shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llava.errors import DataError
from llava.imaging import geometry
from llava.imaging.decode import DecodedImage
from llava.imaging.geometry import fit_image, resize_image
from llava.imaging.image_processor import OpenClipImageProcessorPil
from llava.processing import LlavaMedProcessor
from tests.support.text_tools import llama_like

ROOT = Path(__file__).resolve().parents[2]
KINDS: dict[str, Any] = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    "open_clip": OpenClipImageProcessorPil(size={"shortest_edge": 25}, crop_size={"height": 24, "width": 24}),
    "siglip": SiglipImageProcessorPil(size={"height": 24, "width": 24}),
}
THIN = [(1, 600), (600, 1), (3, 211), (211, 3), (7, 400), (401, 6)]


def processor_of(kind: str, mode: str) -> LlavaMedProcessor:
    return LlavaMedProcessor(llama_like(), KINDS[kind], template="v1", image_mode=mode, num_image_tokens=4)


def strip(size: tuple[int, int], kind: str = "L") -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(kind)


@pytest.mark.parametrize("size", THIN)
@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_only_the_cropped_part_is_resized_with_equal_pixels(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: tuple[int, int]
) -> None:
    processor = processor_of(kind, "square")
    whole = processor.preprocess(strip(size, "RGB"))
    made: list[tuple[int, int]] = []
    plain = Image.Image.resize
    monkeypatch.setattr(geometry, "SMALL", 0)
    monkeypatch.setattr(geometry, "MAX_GROWTH", 1)
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *args, **kw: made.append(size) or plain(self, size, *args, **kw)
    )
    part = processor.preprocess(strip(size, "RGB"))
    assert torch.equal(part, whole)
    assert made and max(max(each) for each in made) <= max(32, *size), "the whole image is not made"


@pytest.mark.parametrize("size", THIN)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("mode", ["pad", "resize"])
def test_padded_and_resized_strips_differ_by_two_gray_levels_at_most(
    monkeypatch: pytest.MonkeyPatch, mode: str, kind: str, size: tuple[int, int]
) -> None:
    processor = processor_of(kind, mode)
    smooth = strip(size, "RGB").point(lambda level: level // 3 + 80)  # far from 0 and 255, where overshoot is cut off
    whole = processor.preprocess(smooth)
    monkeypatch.setattr(geometry, "SMALL", 0)
    monkeypatch.setattr(geometry, "MAX_GROWTH", 1)
    part = processor.preprocess(smooth)
    level = max(1 / 255 / value for value in processor.image_processor.image_std)
    # Both orders round in between by half a level, which weights of an absolute sum of at most 1.25 carry on, and at
    # the end: 2 * (0.625 + 0.5) < 3 levels. Rows come first anyway in an image that is wide.
    bound = 2.001 * level if size[0] < size[1] else 1e-6
    assert float((part - whole).abs().max()) <= bound


@pytest.mark.parametrize("mode", ["square", "pad", "resize", "anyres", "keep"])
@pytest.mark.parametrize("size", [(1, 6000), (60000, 1), (2, 60000), (1, 1_000_000)])
def test_every_mode_makes_little_or_refuses(monkeypatch: pytest.MonkeyPatch, mode: str, size: tuple[int, int]) -> None:
    made = []

    def noted(kind: str) -> Any:
        plain = getattr(Image.Image, kind) if kind == "resize" else Image.new

        def call(*args: Any, **settings: Any) -> Any:
            found = plain(*args, **settings)
            made.append(found.width * found.height)
            if kind == "resize":  # the rows come first, with the width of the result
                box = settings.get("box") or (args[3] if len(args) > 3 else None) or (0, 0, *args[0].size)
                made.append(found.width * round(box[3] - box[1]))
            return found

        return call

    monkeypatch.setattr(Image.Image, "resize", noted("resize"))
    monkeypatch.setattr(Image, "new", noted("new"))
    try:
        pixels = processor_of("clip", mode).preprocess(DecodedImage(strip(size), size))
    except DataError as error:
        assert f"{size[0]} x {size[1]}" in str(error) and "\n" not in str(error)
    else:
        assert pixels.shape[-2:] == (24, 24)
    # 24 times the length is the border of mode pad, already resized across.
    assert max(made, default=0) <= max(geometry.SMALL, 24 * max(size)), "bounded by the length, never its square"


class Custom(CLIPImageProcessorPil):
    """Image processor with a custom step, which transformers runs whole."""

    def normalize(self, image: np.ndarray, *args: Any, **settings: Any) -> np.ndarray:
        return -super().normalize(image, *args, **settings)


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1), (3, 900_000), (1, 4_000_000), (2_000_000, 2)])
def test_what_other_processors_would_make_is_limited(size: tuple[int, int]) -> None:
    own = Custom(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    processor = LlavaMedProcessor(llama_like(), own, template="v1", num_image_tokens=4)
    image = Image.new("L", size)
    assert processor.preprocess(Image.new("L", (1, 50))).shape == (3, 224, 224)
    with pytest.raises(DataError, match=rf"{size[0]} x {size[1]} pixels would be resized to .* more than the limit"):
        processor.preprocess(image)


def test_the_limit_holds_for_what_is_made() -> None:
    with pytest.raises(DataError, match="1 x 9460 pixels would be resized to 9460 x 9460"):
        fit_image(Image.new("L", (1, 9460)), "pad", size=24, fill=(0, 0, 0))
    with pytest.raises(DataError, match="would be resized to 10000 x 9000"):
        resize_image(Image.new("L", (4, 4)), (10_000, 9000), Image.Resampling.BICUBIC)


MEASURED = """
import resource
from PIL import Image
from transformers import CLIPImageProcessorPil
from llava.imaging.decode import DecodedImage
from llava.imaging.image_processor import FastPreprocessor, fit_decoded
path = FastPreprocessor.of(CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336))
def peak(mode, size):
    opened = DecodedImage(Image.new("L", size), size)
    image, whole, box = fit_decoded(opened, mode, size=(336, 336), fill=(0, 0, 0), path=path)
    path.pixels(image, size=whole, box=box)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak("pad", (30, 40))
for mode, size in (("square", (1, 600_000)), ("pad", (1, 60_000))):
    print((peak(mode, size) - before) // 1024)
"""


def test_memory_is_bounded() -> None:
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=900)
    assert max(map(int, done.stdout.split())) < 200  # MiB more than for a small image
