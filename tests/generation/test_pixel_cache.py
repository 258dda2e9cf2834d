"""Pixels of earlier images: decoded once for each caller, bounded in bytes."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from llava.errors import DataError
from llava.generation.chunked_prefill import ChunkedScheduler
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


def made_now(cache: PixelCache, key: str, num: int = 4, owner: str = "x") -> bool:
    """Return whether the pixels of an image were made, not found."""
    calls: list[str] = []

    def make() -> Pixels:
        calls.append(key)
        return pixels(num)

    assert len(cache.made(owner, key, make).tensor) == num
    return bool(calls)


def test_least_recently_used_pixels_are_dropped() -> None:
    cache = PixelCache(10)
    assert made_now(cache, "a") and made_now(cache, "b") and cache.num_bytes == 8
    assert not made_now(cache, "a")
    assert made_now(cache, "c") and cache.num_bytes == 8
    assert not made_now(cache, "a") and made_now(cache, "b") and cache.num_bytes == 8
    assert made_now(cache, "d", 11) and made_now(cache, "d", 11) and cache.num_bytes == 8


def test_callers_do_not_share_pixels() -> None:
    cache = PixelCache(10)
    assert made_now(cache, "a") and made_now(cache, "a", owner="y") and not made_now(cache, "a")


def _raises() -> Pixels:
    raise DataError("not an image")


def test_an_image_is_kept_before_its_making_is_forgotten() -> None:
    found = []

    class Watched(PixelCache):
        def _keep(self, owner: str, key: str, pixels: Pixels) -> None:
            found.append((self._lock.locked(), (owner, key) in self._making))
            super()._keep(owner, key, pixels)

    cache = Watched(10)
    assert made_now(cache, "a") and found == [(True, True)] and not cache._making
    with pytest.raises(DataError):
        cache.made("x", "b", _raises)
    assert not cache._making and made_now(cache, "b")


def test_threads_that_want_the_same_image_make_it_once() -> None:
    cache, calls, entered, may_end = PixelCache(10), [], threading.Event(), threading.Event()

    def make() -> Pixels:
        calls.append(1)
        entered.set()
        assert may_end.wait(10)
        return pixels(4)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(cache.made, "x", "a", make)
        assert entered.wait(10)
        second = pool.submit(cache.made, "x", "a", make)
        assert pool.submit(made_now, cache, "b").result(10)  # other images need not wait
        may_end.set()
        assert first.result(10) is second.result(10)
    assert len(calls) == 1


def test_an_image_that_cannot_be_decoded_is_tried_again() -> None:
    cache = PixelCache(10)

    def fail() -> Pixels:
        raise DataError("damaged")

    for _ in range(2):
        with pytest.raises(DataError, match="damaged"):
            cache.made("x", "a", fail)
    assert made_now(cache, "a")


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


def test_random_padding_is_drawn_for_each_question(loaded: LoadedModel) -> None:
    processor = loaded.processor.changed(random_padding=True)
    for own, keeps in ((loaded.processor, True), (processor, False)):
        engine = LocalEngine(loaded.model, own, prefill_chunk=32, prefix_cache_mb=4)
        assert (engine.pixel_cache is not None) == keeps


def test_all_that_is_kept_is_below_one_limit(loaded: LoadedModel) -> None:
    engine = engine_of(loaded, prefill_chunk=32, prefix_cache_mb=1)
    asked(engine, "What is shown?")
    assert engine.pixel_cache is not None and isinstance(engine.scheduler, ChunkedScheduler)
    assert engine.pixel_cache.max_bytes + engine.scheduler.cache.max_bytes == 1 << 20
    assert engine.prefix_cache_bytes == engine.pixel_cache.num_bytes + engine.driver.prefix_cache_bytes
    assert 0 < engine.pixel_cache.num_bytes < engine.prefix_cache_bytes
