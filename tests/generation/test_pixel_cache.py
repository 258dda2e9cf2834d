"""Pixels of earlier images: decoded once for each caller, bounded in bytes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from llava.generation.engine import LocalEngine
from llava.generation.pixel_cache import PixelCache, Pixels
from llava.generation.protocol import Prompt, Sampling
from llava.model.builder import LoadedModel
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Turn
from tests.support.generation_tools import engine_of
from tests.support.tiny import tiny_image, tiny_llava

SAMPLING = Sampling(max_new_tokens=2)


def pixels(num: int) -> Pixels:
    return Pixels(torch.zeros(num, dtype=torch.uint8), (1, 1))


def test_least_recently_used_pixels_are_dropped() -> None:
    cache = PixelCache(10)
    for key in "ab":
        cache.keep("x", key, pixels(4))
    assert cache.found("x", "a") is not None and cache.num_bytes == 8
    cache.keep("x", "c", pixels(4))
    assert cache.found("x", "b") is None and cache.found("x", "a") is not None and cache.num_bytes == 8
    cache.keep("x", "a", pixels(4))
    assert cache.num_bytes == 8
    cache.keep("x", "d", pixels(11))
    assert cache.found("x", "d") is None and cache.found("x", "c") is not None


def test_callers_do_not_share_pixels() -> None:
    cache = PixelCache(10)
    cache.keep("x", "a", pixels(4))
    assert cache.found("y", "a") is None


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_llava(seed=3)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the files that were decoded."""
    found: list[int] = []
    original = LlavaMedProcessor.open

    def counting(self: LlavaMedProcessor, content: Any) -> object:
        found.append(len(content))
        return original(self, content)

    monkeypatch.setattr(LlavaMedProcessor, "open", counting)
    return found


def asked(engine: LocalEngine, question: str, key: str = "") -> str:
    stream = io.BytesIO()
    tiny_image(0).save(stream, "PNG")
    prompt = Prompt(Conversation((Turn("human", f"<image>\n{question}"),)), (stream.getvalue(),))
    handle = engine.submit(prompt, SAMPLING, key=key)
    return handle.completions()[0].text


def test_a_later_question_does_not_decode_the_image_again(loaded: LoadedModel, decoded: list[int]) -> None:
    engine = engine_of(loaded, prefill_chunk=32, prefix_cache_mb=4)
    first = asked(engine, "What is shown?")
    assert asked(engine, "What is shown?") == first and len(decoded) == 1
    asked(engine, "And where?")
    assert len(decoded) == 1
    asked(engine, "And where?", key="somebody else")
    assert len(decoded) == 2


@pytest.mark.parametrize(
    ("options", "num"),
    [({"prefix_cache_mb": 4, "share_prefix_cache": True}, 1), ({"prefix_cache_mb": 0}, 2)],
)
def test_callers_share_images_only_if_they_share_the_cache(
    loaded: LoadedModel, decoded: list[int], options: dict[str, Any], num: int
) -> None:
    engine = engine_of(loaded, prefill_chunk=32, **options)
    for key in ("a", "b"):
        asked(engine, "What is shown?", key)
    assert len(decoded) == num
