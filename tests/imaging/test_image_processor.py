"""Fast preprocessing equals the image processor, bit for bit; custom processors are used as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil

from llava.imaging.decode import DecodedImage
from llava.imaging.geometry import fit_image, mean_color, to_rgb
from llava.imaging.image_processor import FastPreprocessor, OpenClipImageProcessorPil
from llava.processing import LlavaMedProcessor
from tests.support.text_tools import llama_like

TOKENIZER = llama_like()
KINDS: dict[str, Any] = {
    "clip": lambda n: CLIPImageProcessorPil(size={"shortest_edge": n}, crop_size={"height": n, "width": n}),
    "larger crop": lambda n: CLIPImageProcessorPil(size={"shortest_edge": n}, crop_size={"height": n + 6, "width": n}),
    "no resize": lambda n: CLIPImageProcessorPil(do_resize=False, crop_size={"height": n, "width": n}),
    "not normalized": lambda n: CLIPImageProcessorPil(size={"shortest_edge": n}, crop_size=n, do_normalize=False),
    "open_clip": lambda n: OpenClipImageProcessorPil(size={"shortest_edge": n}, crop_size={"height": n, "width": n}),
    "siglip": lambda n: SiglipImageProcessorPil(size={"height": n, "width": n + 3}),
    "vit": lambda n: ViTImageProcessorPil(size={"height": n, "width": n}, resample=Image.Resampling.BILINEAR),
}
MODES = ("L", "RGB", "LA", "P", "1", "CMYK", "I;16")


def random_image(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 77 + values[..., 1])
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    st.integers(13, 31),
    st.sampled_from(["square", "pad", "resize"]),
    st.builds(
        random_image,
        st.sampled_from(MODES),
        st.tuples(st.integers(3, 80), st.integers(3, 80)),
        st.integers(0, 1000),
    ),
)
def test_same_bits_as_the_image_processor(kind: str, side: int, mode: str, image: Image.Image) -> None:
    own = KINDS[kind](side)
    processor = LlavaMedProcessor(TOKENIZER, own, template="v1", image_mode=mode, num_image_tokens=4)
    assert FastPreprocessor.of(own) is not None
    fill = mean_color(own.image_mean)
    fitted = fit_image(image, mode, size=processor.image_size, fill=fill)
    expected = own(images=[fitted], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.pixels([image]), expected)
    assert processor.preprocess(image).dtype == torch.float32
    assert torch.equal(processor.preprocess(DecodedImage(to_rgb(image), image.size)), expected[0])


class Inverted(CLIPImageProcessorPil):
    """Image processor with a custom step."""

    def normalize(self, image: np.ndarray, *args: Any, **settings: Any) -> np.ndarray:
        return -super().normalize(image, *args, **settings)


def test_others_keep_their_own_way() -> None:
    own = Inverted(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    assert FastPreprocessor.of(own) is None
    assert FastPreprocessor.of(CLIPImageProcessorPil(size={"shortest_edge": 9, "longest_edge": 12})) is None
    processor = LlavaMedProcessor(TOKENIZER, own, template="v1", num_image_tokens=4)
    image = random_image("L", (40, 30), 0)
    plain = LlavaMedProcessor(TOKENIZER, KINDS["clip"](20), template="v1", num_image_tokens=4)
    assert torch.equal(processor.preprocess(image), -plain.preprocess(image))
    assert processor.changed(fast_jpeg=True)._scale_of((9000, 9000)) == 1
