"""Language models of many families: built around and adapted exactly, or refused at build by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llava.errors import CheckpointError
from llava.generation.layout_check import choose_layout
from llava.model.builder import LoadedModel, build_model
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter
from llava.model.lora import add_lora, freeze_for, language_linear_layers
from tests.support.model_tools import batch, logits, shake, trained
from tests.support.tiny import byte_tokenizer, write_tiny_tower

SIZES = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2},
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

BETWEEN = "layers between its last hidden state and its head"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "modernbert-decoder": (
        {"local_attention": 16, "pad_token_id": 0},
        BETWEEN,
    ),
    "bert": ({"is_decoder": True}, BETWEEN),
    "roberta": ({"is_decoder": True}, BETWEEN),
    "electra": ({"is_decoder": True}, BETWEEN),
    "mamba": ({"state_size": 8}, "does not take past_key_values"),
    "mamba2": ({"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}, "does not take past_key_values"),
    "falcon_mamba": ({"state_size": 8}, "does not take past_key_values"),
    "rwkv": ({"attention_hidden_size": 32, "context_length": 256}, "does not take past_key_values"),
    "openai-gpt": (GPT, "does not take past_key_values"),
    "recurrent_gemma": ({"lru_width": 32, "attention_window_size": 32, "head_dim": 8}, "logits_soft_cap"),
    "gemma2": ({"head_dim": 8}, "final_logit_softcapping"),
    "moshi": ({}, "embeddings and a head of"),
    "fuyu": ({}, "already a multimodal model"),
}
WITHOUT_ATTENTION = ("mamba", "mamba2", "falcon_mamba", "rwkv")
"""Kinds whose configurations have no heads."""

LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8, "attention_chunk_size": 32}
JAMBA = {
    **{"num_experts": 2, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    **{"expert_layer_offset": 1, "use_mamba_kernels": False},
}
BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "attn_layer_indices": [1]}
FUSED = "dense|dense_4h_to_h|dense_h_to_4h|query_key_value"
ADAPTED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": (GPT, "c_attn|c_fc|c_proj"),
    "gpt_bigcode": (GPT, "c_attn|c_fc|c_proj"),
    "falcon": (
        {"num_kv_heads": 2, "new_decoder_architecture": True},
        "dense|dense_4h_to_h|dense_h_to_4h|query_key_value",
    ),
    "bloom": ({"n_layer": 2, "n_head": 4}, "dense|dense_4h_to_h|dense_h_to_4h|query_key_value"),
    "phi": ({}, "dense|fc1|fc2|k_proj|q_proj|v_proj"),
    "phi3": ({"pad_token_id": 0}, "down_proj|gate_up_proj|o_proj|qkv_proj"),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, "Wqkv|down_proj|out_proj|up_proj"),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "fc1|fc2|k_proj|out_proj|q_proj|v_proj"),
    "llama4_text": (LLAMA4, "down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj"),
    "jamba": (JAMBA, "down_proj|gate_proj|in_proj|k_proj|o_proj|q_proj|up_proj|v_proj|x_proj"),
    "bamba": (BAMBA, "down_proj|gate_proj|in_proj|k_proj|o_proj|q_proj|up_proj|v_proj"),
}


def write_language_model(folder: Path, kind: str, settings: dict[str, Any]) -> str:
    """Write a tiny random language model of a kind with the byte-level tokenizer."""
    tokenizer = byte_tokenizer()
    sizes = {name: size for name, size in SIZES.items() if kind not in WITHOUT_ATTENTION or name.startswith("hidden")}
    config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **sizes, **settings})
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build(folder: Path, kind: str, settings: dict[str, Any]) -> LoadedModel:
    lm = write_language_model(folder / "lm", kind, settings)
    loaded = build_model(lm, str(write_tiny_tower(folder / "tower")), projector_type="mlp2x_gelu")
    loaded.model.eval()
    return loaded


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_cannot_be_built_on_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    settings, reason = REFUSED[kind]
    if kind == "fuyu":
        AutoConfig.for_model(kind).save_pretrained(tmp_path / "lm")
        with pytest.raises(CheckpointError, match=reason):
            build_model(str(tmp_path / "lm"), "nowhere")
        return
    lm = write_language_model(tmp_path / "lm", kind, settings)
    # Before the tower is read: that of this test does not exist.
    with pytest.raises(CheckpointError, match=reason) as caught:
        build_model(lm, "nowhere")
    assert kind in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ADAPTED)
def test_an_adapter_is_on_every_linear_layer_trains_and_is_read_back(tmp_path: Path, kind: str) -> None:
    settings, names = ADAPTED[kind]
    loaded = build(tmp_path, kind, settings)
    ids = torch.tensor([[1, 9, 30, 40, 50]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    with torch.no_grad():
        expected, found = plain(input_ids=ids).logits, loaded.model(input_ids=ids).logits
    num_words = len(byte_tokenizer())
    torch.testing.assert_close(found[..., :num_words], expected[..., :num_words], rtol=0, atol=1e-5)
    assert language_linear_layers(loaded.model) == rf"(?:.*\.)?language_model\..*\.(?:{names})"
    network = add_lora(loaded, r=2)
    freeze_for(network, has_adapter=True)
    network.train()
    inputs = batch(loaded)
    network(**inputs).loss.backward()
    ups = [parameter for name, parameter in network.named_parameters() if ".lora_B" in name]
    assert ups and all(parameter.grad is not None and parameter.grad.any() for parameter in ups)
    shake(trained(network))
    network.eval()
    expected = logits(loaded)
    save_adapter(network, loaded.processor, tmp_path / "adapter", origin=loaded.origin)
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "adapter")), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama4_text", "jamba", "bamba", "falcon", "bloom"])
def test_kinds_without_an_exact_layout_are_padded(tmp_path: Path, kind: str) -> None:
    config = AutoConfig.for_model(kind, **{"vocab_size": 300, **SIZES, **ADAPTED[kind][0]})
    assert choose_layout(config) == "padded"


class Router(nn.Linear):
    """A linear layer that returns its scores as well, as routers do."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(input)
        return scores.softmax(-1), scores


Router.__module__ = "transformers.models.made_up"


class Language(nn.Module):
    """Modules whose last names do not say what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"proj": nn.Linear(4, 4), "gate": nn.LayerNorm(4)})
        self.mlp = nn.ModuleDict({"proj": nn.Conv1d(4, 4, 1), "gate": Conv1D(4, 4), "router": Router(4, 4)})


def test_a_name_that_means_two_things_is_told_apart_by_its_parent() -> None:
    model = nn.Module()
    model.language_model = Language()
    assert language_linear_layers(model) == r"(?:.*\.)?language_model\.(?:.*\.)?(?:attn\.proj|mlp\.gate)"
