"""Out of memory: half the slots once with the same answers, then errors for requests that do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llava.generation.engine import LocalEngine
from llava.generation.failures import is_out_of_memory
from llava.generation.protocol import Sampling
from llava.model.builder import LoadedModel
from tests.support.generation_tools import ask, assert_same_answers, engine_of, mixed_prompts, one
from tests.support.tiny import tiny_llava

SAMPLING = Sampling(max_new_tokens=16, temperature=1.0, seed=2, logprobs=True)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_llava(seed=3)


def limit(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, name: str, fails: Callable[[int, int], bool]) -> None:
    """Make a method of the runner run out of memory when `fails(call, sequences)`."""
    original = getattr(engine.scheduler.runner, name)
    calls = 0

    def limited(first: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if fails(calls, len(first)):
            raise torch.OutOfMemoryError("out of memory: tried to allocate")
        return original(first, *rest)

    monkeypatch.setattr(engine.scheduler.runner, name, limited)


@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("decode", lambda call, num: call == 4),
        ("decode", lambda call, num: num > 4),
        ("prefill", lambda call, num: call == 1),
        ("prefill", lambda call, num: call == 2),
    ],
)
def test_half_the_slots_give_the_same_answers(
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    fails: Callable[[int, int], bool],
) -> None:
    expected = engine_of(loaded).generate(mixed_prompts(), SAMPLING)
    engine = engine_of(loaded, max_slots=8, max_prefill_tokens=600)
    limit(engine, monkeypatch, name, fails)
    with caplog.at_level(logging.WARNING):
        answers = engine.generate(mixed_prompts(), SAMPLING)
    for prompt, found, wanted in zip(mixed_prompts(), answers, expected, strict=True):
        assert_same_answers(engine, [prompt], found, wanted, SAMPLING)
        if found[0].token_ids == wanted[0].token_ids:
            assert found[0].logprobs == pytest.approx(wanted[0].logprobs, abs=1e-4)
    assert [record.message for record in caplog.records if "out of memory" in record.message] == [
        "out of memory: continuing with at most 4 sequences at a time"
    ]
    assert engine.scheduler.max_slots == 4


def test_what_never_fits_is_an_error_and_the_rest_is_answered(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(loaded, max_slots=4, max_prefill_tokens=100)
    original = engine.scheduler.runner.prefill

    def prefill(sequences: Any, images: Any) -> Any:
        if max(len(sequence.input_ids) for sequence in sequences) > 260:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return original(sequences, images)

    monkeypatch.setattr(engine.scheduler.runner, "prefill", prefill)
    prompts = [ask("a?", 0), ask("b" * 200, 1), ask("c?", 0)]
    answers = [answer for [answer] in engine.generate(prompts, SAMPLING)]
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert "out of memory" in str(answers[1].error)
    alone = one(engine_of(loaded), prompts[2], SAMPLING)
    assert_same_answers(engine, prompts[2:], answers[2:], [alone], SAMPLING)


def test_decoding_that_never_fits_ends_in_errors(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(loaded, max_slots=4)
    limit(engine, monkeypatch, "decode", lambda call, num: True)
    answers = engine.generate(mixed_prompts(), SAMPLING)
    assert {answer.finish for [answer] in answers} == {"error"}
    assert not engine.scheduler.running and not engine.scheduler.waiting


def test_only_memory_counts() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
