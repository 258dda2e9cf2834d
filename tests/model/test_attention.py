"""Attention by pieces equals attention with the whole tree's mask, without creating one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, GptOssConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava.constants import TREE_ATTENTION
from llava.data.attention_plan import attention_plan
from llava.data.flat_batch import FlatBatch, flatten, target_logits
from llava.errors import ConfigError
from llava.model.attention import (
    attend_by_matmul,
    attend_by_pieces,
    flex_computes,
    tree_attention,
    use_tree_attention,
)
from llava.model.builder import LoadedModel
from llava.model.config import LlavaMedConfig
from llava.model.modeling import LlavaMedForConditionalGeneration
from tests.support.trees import IMAGE, encoded, random_images, random_sequences

WIDTH = 8


def layer() -> nn.Module:
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    return module


def random_states(num_tokens: int, heads: int, key_heads: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, count, num_tokens, WIDTH) for count in (heads, key_heads, key_heads)]
    return [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]


def random_batch(chance: random.Random) -> FlatBatch:
    sequences = random_sequences(chance, 7, longest=chance.choice([6, 60]))
    return flatten(sequences, random_images(2), image_token_id=IMAGE)


@given(
    chance=st.randoms(use_true_random=False), window=st.sampled_from([None, 1, 9]), key_heads=st.sampled_from([1, 2, 4])
)
@settings(max_examples=30, deadline=None)
def test_pieces_equal_the_dense_mask(chance: random.Random, window: int | None, key_heads: int) -> None:
    batch = random_batch(chance)
    plan = attention_plan(batch.segment_ids, batch.parents, batch.position_ids[0])
    places = torch.arange(batch.num_tokens)
    dense = plan.sees(places[:, None], places[None, :], window)
    states = random_states(batch.num_tokens, 4, key_heads, seed=len(dense))
    expected = F.scaled_dot_product_attention(*states, attn_mask=dense, scale=0.3, enable_gqa=True).transpose(1, 2)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weights).sum(), states)
    with_sdpa, _ = tree_attention(layer(), *states, None, scaling=0.3, sliding_window=window, tree_plan=plan)
    for found in (with_sdpa, attend_by_matmul(*states, plan, scaling=0.3, window=window)):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), states), gradients)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_on_a_cpu_uses_matrix_products(autocast: bool) -> None:
    batch = random_batch(random.Random(0))
    plan = attention_plan(batch.segment_ids, batch.parents, batch.position_ids[0])
    states = [state.detach().to(torch.float32) for state in random_states(batch.num_tokens, 4, 2, seed=0)]
    half = [state.bfloat16() for state in states]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend_by_pieces(*(states if autocast else half), plan)
    assert torch.equal(found, attend_by_matmul(*half, plan))
    torch.testing.assert_close(found.float(), attend_by_pieces(*states, plan), rtol=0.05, atol=0.05)


@given(chance=st.randoms(use_true_random=False), window=st.sampled_from([None, 9]))
@settings(max_examples=6, deadline=None)
@torch.no_grad()
def test_the_block_mask_of_cuda_gives_the_same(chance: random.Random, window: int | None) -> None:
    """Only the mask is tested: FlexAttention runs uncompiled here."""
    batch = random_batch(chance)
    plan = attention_plan(batch.segment_ids, batch.parents, batch.position_ids[0])
    query, key, value = (state.float() for state in random_states(batch.num_tokens, 2, 2, seed=0))
    flexed = flex_attention(query, key, value, block_mask=plan.block_mask(window))
    torch.testing.assert_close(flexed.transpose(1, 2), attend_by_pieces(query, key, value, plan, window=window))


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_plan_it_is_transformers_sdpa(masked: bool) -> None:
    states = random_states(6, 4, 2, seed=0)
    module = layer()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril() if masked else None
    found, _ = tree_attention(module, *states, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, *states, mask, scaling=0.3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_scores_that_sdpa_does_not_compute_are_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        tree_attention(layer(), *random_states(6, 4, 4, seed=0), None, **{name: torch.ones(())})  # type: ignore[arg-type]


def test_a_language_model_with_an_attention_of_its_own_keeps_it() -> None:
    text = GptOssConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                        intermediate_size=16, num_local_experts=2, vocab_size=300)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlavaMedForConditionalGeneration(LlavaMedConfig(text_config=text, vision_config=vision))
    use_tree_attention(model)
    assert model.get_decoder().config._attn_implementation == "eager"


def test_the_tower_does_not_attend_in_trees(tiny: LoadedModel) -> None:
    assert tiny.model.get_decoder().config._attn_implementation == TREE_ATTENTION
    assert tiny.model.model.vision_tower.config._attn_implementation == "sdpa"


class _Largest(TorchDispatchMode):
    """Dispatch mode that records the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.numel = max(self.numel, *(part.numel() for part in outputs if isinstance(part, Tensor)), 0)
        return result


def test_no_mask_over_the_row_is_made(tiny: LoadedModel) -> None:
    sequences = [
        encoded([5 + chain, *([7] * 50), 8 + branch, 9], trained=[52]) for chain in range(30) for branch in range(2)
    ]
    batch = flatten(sequences, {}, image_token_id=IMAGE)
    assert len(batch.tree_lengths) == 30
    with _Largest() as largest, torch.no_grad():
        target_logits(tiny.model, batch)
    assert largest.numel < batch.num_tokens**2 // 4
    assert largest.numel <= max(batch.num_tokens * 64, len(batch.predictor) * 262)


@pytest.mark.parametrize(
    ("device", "width", "dropout", "expected"),
    [("cuda", 16, 0.0, True), ("cuda", 8, 0.0, False), ("cuda", 128, 0.1, False), ("cpu", 128, 0.0, False)],
)
def test_where_flex_attention_is_used(device: str, width: int, dropout: float, expected: bool) -> None:
    assert flex_computes(device, width=width, dropout=dropout) is expected
