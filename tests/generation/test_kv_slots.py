"""Slots hold what the paths of a row held, whoever joins, leaves, and however they grow."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llava.generation.kv_slots import CapturedRow, SlotCache, decoding_masks

HEADS, WIDTH, LAYERS = 2, 3, 2


def row(num_tokens: int, generator: torch.Generator) -> CapturedRow:
    captured = CapturedRow()
    for layer in range(LAYERS):
        states = torch.randn(2, 1, HEADS, num_tokens, WIDTH, generator=generator)
        assert torch.equal(captured.update(states[0], states[1], layer)[0], states[0])
    return captured


def path_states(captured: CapturedRow, path: Tensor) -> list[Tensor]:
    return [states[0][:, path] for states in (*captured.keys, *captured.values)]


def decode(cache: SlotCache, expected: list[list[Tensor]], generator: torch.Generator) -> None:
    """One step of all running sequences, compared with plain concatenation."""
    positions = cache.positions()
    assert positions[:, 0].tolist() == [held[0].shape[1] for held in expected]
    mask = cache.mask()
    for layer in range(LAYERS):
        new = torch.randn(2, len(expected), HEADS, 1, WIDTH, generator=generator)
        found = cache.update(new[0], new[1], layer)
        for part in range(2):
            assert mask.shape == (len(expected), 1, 1, found[part].shape[2])
            for slot, held in enumerate(expected):
                index = part * LAYERS + layer
                held[index] = torch.cat([held[index], new[part, slot]], dim=1)
                assert torch.equal(found[part][slot][:, mask[slot, 0, 0]], held[index])
    cache.advance()


@pytest.mark.parametrize("seed", range(5))
def test_joining_leaving_and_growing_keep_every_sequence(seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cache = SlotCache(max_slots=6, max_length=400)
    expected: list[list[Tensor]] = []
    for _ in range(40):
        free = 6 - len(expected)
        if free and draw.random() < 0.5:
            captured = row(draw.choice([5, 30, 200]), generator)
            paths = [
                torch.arange(captured.keys[0].shape[2])[draw.randrange(3) :: draw.randint(1, 2)]
                for _ in range(draw.randint(1, free))
            ]
            cache.join(captured, paths)
            expected += [path_states(captured, path) for path in paths]
        if expected and draw.random() < 0.3:
            slot = draw.randrange(len(expected))
            cache.leave(slot)
            expected[slot] = expected[-1]
            expected.pop()
        if expected:
            decode(cache, expected, generator)
    assert cache.keys[0].shape[0] <= 6 and cache.keys[0].shape[2] <= 400


def test_memory_is_given_back() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = SlotCache(max_slots=8, max_length=64)
    captured = row(5, generator)
    cache.join(captured, [torch.arange(5)] * 8)
    for _ in range(6):
        cache.leave(0)
    expected = [path_states(captured, torch.arange(5)) for _ in range(2)]
    cache.shrink(2)
    assert all(buffer.shape[0] == 2 for buffer in (*cache.keys, *cache.values))
    decode(cache, expected, generator)


def test_a_window_looks_back_by_position() -> None:
    cache = SlotCache(max_slots=2, max_length=64)
    cache.join(row(9, torch.Generator().manual_seed(0)), [torch.arange(9), torch.arange(3)])
    mask = cache.mask(4)[:, 0, 0]
    assert mask[0].nonzero()[:, 0].tolist() == [6, 7, 8, 9]
    assert mask[1].nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_a_model_gets_the_masks_that_its_layers_take() -> None:
    cache = SlotCache(max_slots=1, max_length=64)
    cache.join(row(9, torch.Generator().manual_seed(0)), [torch.arange(9)])
    whole, near = cache.mask(), cache.mask(4)
    full, sliding = "full_attention", "sliding_attention"
    assert torch.equal(decoding_masks(cache, SimpleNamespace()), whole)
    assert torch.equal(decoding_masks(cache, SimpleNamespace(sliding_window=4)), near)
    assert torch.equal(decoding_masks(cache, SimpleNamespace(sliding_window=4, layer_types=[full] * 2)), whole)
    assert torch.equal(decoding_masks(cache, SimpleNamespace(sliding_window=4, layer_types=[sliding] * 2)), near)
    both = decoding_masks(cache, SimpleNamespace(sliding_window=4, layer_types=[full, sliding]))
    assert isinstance(both, dict) and torch.equal(both[full], whole) and torch.equal(both[sliding], near)
