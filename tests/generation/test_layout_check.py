"""Selection of the layout of a language model by trial."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    JetMoeConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from llava.generation import layout_check
from llava.generation.layout_check import choose_layout
from llava.model.config import LlavaMedConfig

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
LAYERED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}

EXACT: dict[str, Any] = {
    "llama": LlamaConfig(**LAYERED),
    "mistral with a window": MistralConfig(**LAYERED, sliding_window=4096),
    "qwen2 with windows in some layers": Qwen2Config(
        **{**LAYERED, "num_hidden_layers": 4}, use_sliding_window=True, sliding_window=512, max_window_layers=1
    ),
    "gpt2, learned positions": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300),
}
INEXACT: dict[str, Any] = {
    "bloom, ALiBi": BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=300),
    "mpt, ALiBi": MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=300),
    "falcon, ALiBi": FalconConfig(**SMALL, alibi=True),
    "gemma2, soft caps": Gemma2Config(**LAYERED, head_dim=8, sliding_window=64),
    "gpt-oss, sinks": GptOssConfig(**LAYERED, head_dim=8, num_local_experts=2),
    "qwen3-next, one layer in four attends": Qwen3NextConfig(
        **{**LAYERED, "num_hidden_layers": 4}, head_dim=8, num_experts=0
    ),
    "mamba, recurrent": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=300, state_size=4),
}


@pytest.mark.parametrize("name", EXACT)
def test_models_with_given_positions_share(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=layout_check.__name__):
        assert choose_layout(EXACT[name]) == "tree"
    assert EXACT[name].model_type in caplog.text


@pytest.mark.parametrize("name", INEXACT)
def test_others_are_padded_and_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_layout(INEXACT[name]) == "padded"
    assert INEXACT[name].model_type in caplog.text and "padded" in caplog.text


@pytest.mark.parametrize("lm", ["llama", "mistral with a window", "gpt2, learned positions"])
def test_models_that_decode_in_slots_share(lm: str) -> None:
    assert choose_layout(EXACT[lm], decodes=True) == "tree"


def test_a_model_that_attends_to_other_keys_than_it_caches_is_padded_for_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = JetMoeConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=300,
    )
    assert choose_layout(config) == "tree"
    assert choose_layout(config, decodes=True) == "padded"
    assert "jetmoe attends to other keys than it caches" in caplog.text


def test_a_model_that_shares_wrongly_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without positions in the tree, only the first layout that agrees is used."""
    from llava.data import flat_batch

    real = flat_batch.FlatBatch.model_inputs

    def by_place(batch: flat_batch.FlatBatch) -> dict[str, Any]:
        inputs = real(batch)
        if batch.layout == "tree":
            inputs["position_ids"] = torch.arange(batch.num_tokens)[None]
        return inputs

    monkeypatch.setattr(flat_batch.FlatBatch, "model_inputs", by_place)
    assert choose_layout(EXACT["llama"]) == "flat"


def test_the_given_config_and_the_random_state_stay() -> None:
    text = LlamaConfig(**{**LAYERED, "num_hidden_layers": 5})
    torch.manual_seed(3)
    before = torch.get_rng_state()
    choose_layout(LlavaMedConfig(text_config=text))
    assert torch.equal(torch.get_rng_state(), before)
    assert (text.num_hidden_layers, text.vocab_size) == (5, 300)
