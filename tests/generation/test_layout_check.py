"""Which layout a model gets: found by computing, so wrong positions are noticed whatever the model is called."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    PretrainedConfig,
    Qwen2Config,
)

from llava.data.flat_batch import FlatBatch, flatten
from llava.generation import layout_check
from llava.generation.layout_check import choose_layout

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 300,
}
EXACT: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral with a window": MistralConfig(num_key_value_heads=2, sliding_window=6, **SIZES),
    "qwen2": Qwen2Config(num_key_value_heads=2, **SIZES),
    "qwen2 with windows in some layers": Qwen2Config(
        num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1, **SIZES
    ),
    "gpt2 (learned positions)": GPT2Config(n_embd=32, n_head=4, n_layer=3, vocab_size=300),
}
NOT_EXACT: dict[str, PretrainedConfig] = {
    "bloom (ALiBi)": BloomConfig(hidden_size=32, n_head=4, n_layer=3, vocab_size=300),
    "mpt (ALiBi)": MptConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=300),
    "mamba (recurrent)": MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=300, state_size=8),
}


@pytest.mark.parametrize("name", EXACT)
def test_models_with_given_positions_share_beginnings(name: str) -> None:
    assert choose_layout(EXACT[name]) == "tree"


@pytest.mark.parametrize("name", NOT_EXACT)
def test_other_models_get_padded_rows_and_the_log_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_layout(NOT_EXACT[name]) == "padded"
    assert "layout padded" in caplog.text and NOT_EXACT[name].model_type in caplog.text


def test_the_text_config_of_a_whole_model_is_tried_and_kept_as_it_was() -> None:
    config = LlavaConfig(text_config=LlamaConfig(**SIZES))
    before = config.to_dict()
    state = torch.get_rng_state()
    assert choose_layout(config) == "tree"
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("broken", [("tree",), ("tree", "flat")])
def test_an_inexact_layout_is_noticed(broken: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def squeezed(*args: Any, **options: Any) -> FlatBatch:
        """Every position halved, as a model would have it that counts otherwise."""
        batch = flatten(*args, **options)
        return replace(batch, position_ids=batch.position_ids // 2) if batch.layout in broken else batch

    monkeypatch.setattr(layout_check, "flatten", squeezed)
    assert choose_layout(EXACT["llama"]) == ("padded" if "flat" in broken else "flat")
