"""Scaled decoding of large JPEG files: off by default, close to full decoding, and only for safe formats."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from transformers import CLIPImageProcessorPil

from benchmarks.radiographs import as_jpeg, as_png, film
from llava.data.image_store import ImageIndex, ImageStore
from llava.errors import ConfigError, DataError
from llava.eval import options
from llava.imaging import decode
from llava.imaging.jpeg import MARGINS, choose_scale
from llava.processing import LlavaMedProcessor
from llava.utils.cli import Parser
from tests.support.text_tools import llama_like

SIDE = 56
MODES = ("square", "pad", "resize")
SIZES = ((225, 224), (224, 301), (451, 337), (449, 613))
"""Odd sizes: at a smaller scale the image covers pixels of the last column or row only partly."""


def make(mode: str = "square", *, fast: bool, side: int = SIDE) -> LlavaMedProcessor:
    own = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaMedProcessor(llama_like(), own, template="v1", image_mode=mode, num_image_tokens=4, fast_jpeg=fast)


@lru_cache
def smooth(width: int, height: int) -> Image.Image:
    """Return an X-ray-like image without details finer than its pixels."""
    return film(width, height, 1).filter(ImageFilter.GaussianBlur(2))


def levels(processor: LlavaMedProcessor, content: bytes) -> np.ndarray:
    """Return the input of the model as gray levels."""
    own: Any = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (own.image_mean, own.image_std))
    return ((processor.preprocess(processor.open(content)) * std + mean) * 255).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_close_to_the_whole_image(size: tuple[int, int]) -> None:
    image = smooth(*size)
    for mode in MODES:
        fast, whole = make(mode, fast=True), make(mode, fast=False)
        for content in (as_jpeg(image), as_jpeg(Image.merge("RGB", [image] * 3))):
            opened = fast.open(content)
            assert opened.scale in (2, 4) and opened.size == size
            assert opened.image.size == tuple(-(-side // opened.scale) for side in size)
            difference = np.abs(levels(fast, content) - levels(whole, content))
            # One in a thousand is three pixels here; an image of a real size is tested last.
            assert difference.mean() <= 0.6 and np.percentile(difference, 99) <= 6


def test_random_padding_moves_both_alike() -> None:
    content = as_jpeg(smooth(449, 613))
    moved = []
    for fast in (True, False):
        processor = make("pad", fast=fast)
        processor._border = lambda: {"fill": (122, 116, 104), "shift": 1}  # type: ignore[method-assign]
        moved.append(levels(processor, content))
    difference = np.abs(moved[0] - moved[1])
    assert difference.mean() <= 0.6 and np.percentile(difference, 99) <= 6


@given(st.tuples(*[st.integers(1, 20_000)] * 2), st.tuples(*[st.integers(1, 700)] * 2))
def test_never_below_what_is_needed(size: tuple[int, int], needed: tuple[int, int]) -> None:
    scale = choose_scale(size, needed)
    assert scale in (1, *MARGINS)
    if scale > 1:
        assert all(have >= 2 * scale * need for have, need in zip(size, needed, strict=True))


def test_off_unless_asked_for() -> None:
    content = as_jpeg(smooth(449, 613))
    assert not make(fast=False).fast_jpeg
    assert make(fast=False).open(content).scale == 1
    assert decode.decode_image(content).image.size == decode.load_image(content).size == (449, 613)


def turned(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif.tobytes()}


def contents() -> dict[str, bytes]:
    image = smooth(449, 613)
    color = Image.merge("RGB", [image, image.rotate(180), image])
    return {
        "small": as_jpeg(image.resize((2 * SIDE + 90, 4 * SIDE - 1))),
        "turned": as_jpeg(image, **turned(6)),
        "turned color": as_jpeg(color, **turned(3)),
        "CMYK": as_jpeg(color.convert("CMYK")),
        "4:2:2": as_jpeg(color, subsampling=1),
        "PNG": as_png(image),
    }


@pytest.mark.parametrize("kind", contents())
def test_decoded_whole(kind: str) -> None:
    content = contents()[kind]
    fast, whole = make("pad", fast=True), make("pad", fast=False)
    assert fast.open(content).scale == 1
    assert torch.equal(fast.preprocess(fast.open(content)), whole.preprocess(whole.open(content)))


def test_upright_exif_and_progressive_files_are_scaled() -> None:
    image = smooth(449, 613)
    for content in (as_jpeg(image, **turned(1)), as_jpeg(image, progressive=True)):
        assert make(fast=True).open(content).scale == 4


@pytest.mark.parametrize("mode", ["keep", "anyres"])
def test_no_effect_where_all_pixels_count(mode: str) -> None:
    assert make(mode, fast=True).open(as_jpeg(smooth(449, 613))).scale == 1


def test_a_file_that_is_cut_off_is_refused() -> None:
    content = as_jpeg(smooth(449, 613))
    with pytest.raises(DataError, match="cannot be decoded"):
        make(fast=True).open(content[: len(content) // 2])
    with pytest.raises(DataError, match="its format is unknown"):
        make(fast=True).open(b"neither")


def test_kept_with_the_processor_and_named_by_the_fingerprint(tmp_path: Path) -> None:
    whole, fast = make(fast=False), make(fast=True)
    assert whole.image_fingerprint != fast.image_fingerprint
    fast.save_pretrained(tmp_path)
    again = LlavaMedProcessor.from_pretrained(tmp_path)
    assert again.fast_jpeg and again.image_fingerprint == fast.image_fingerprint
    assert again.changed(fast_jpeg=None).fast_jpeg
    assert again.changed(fast_jpeg=False).image_fingerprint == whole.image_fingerprint
    with pytest.raises(ConfigError, match="fast_jpeg is 'yes'; expected true or false"):
        again.changed(fast_jpeg="yes")  # type: ignore[arg-type]


def test_keys_never_mix(tmp_path: Path) -> None:
    (tmp_path / "scan.jpg").write_bytes(as_jpeg(smooth(449, 613)))
    stores = [ImageStore(ImageIndex(tmp_path), make(fast=fast)) for fast in (False, True)]
    keys = [store.key("scan.jpg") for store in stores]
    assert keys[0] != keys[1]
    pixels = [store.pixels(key) for store, key in zip(stores, keys, strict=True)]
    assert not torch.equal(*pixels) and pixels[0].shape == pixels[1].shape


@pytest.mark.parametrize(
    ("words", "value"),
    [([], None), (["--fast_jpeg"], True), (["--fast-jpeg", "False"], False), (["--fast_jpeg=on"], True)],
)
def test_option_of_every_command_that_asks_a_model(words: list[str], value: bool | None) -> None:
    parser = Parser()
    options.add_model_options(parser)
    assert parser.parse_args(["--model", "x", *words]).fast_jpeg is value


def test_an_image_of_a_real_size_is_near_the_benchmarks_numbers() -> None:
    """The image is one of those that benchmarks/data_loading.py measures, which guards the table there."""
    content = as_jpeg(film(1345, 1699, 6))
    fast, whole = make("pad", fast=True, side=336), make("pad", fast=False, side=336)
    assert fast.open(content).scale == 2
    difference = np.abs(levels(fast, content) - levels(whole, content))
    assert difference.mean() <= 0.6 and np.percentile(difference, 99.9) <= 6
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.size == (1345, 1699)
