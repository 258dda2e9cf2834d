"""GGUF conversion: names, row order of queries and keys, and a tiny file against its original model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llava.errors import CheckpointError
from llava.model.packaged import smollm

HEADS, KEY_HEADS = 4, 2
BYTES = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]]
"""The letters that byte-level BPE writes for most bytes; the rest follow as chr(256 + n)."""


def permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return llama.cpp's order, written independently: row (head, half, pair) moves to (head, pair, half)."""
    size = weight.shape[0] // num_heads
    order = [
        head * size + half * (size // 2) + pair
        for head in range(num_heads)
        for pair in range(size // 2)
        for half in range(2)
    ]
    return weight[order]


def vocabulary() -> list[str]:
    letters = BYTES + [chr(256 + number) for number in range(256 - len(BYTES))]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he", "Ġt"]


def as_llama_cpp(name: str, value: torch.Tensor) -> tuple[str, np.ndarray[Any, Any]]:
    """Return a parameter under llama.cpp's name and in its order."""
    short = {long: key for key, long in smollm.BLOCK_NAMES.items()}
    other = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in other:
        return other[name], value.numpy()
    _, _, layer, rest = name.split(".", 3)
    key = short[rest.removesuffix(".weight")]
    if key in ("attn_q", "attn_k"):
        value = permuted(value, HEADS if key == "attn_q" else KEY_HEADS)
    return f"blk.{layer}.{key}.weight", value.numpy()


def write_tiny(path: Path, model: LlamaForCausalLM, *, architecture: str = "llama") -> None:
    config = model.config
    writer: Any = gguf.GGUFWriter(str(path), architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3, 3, 3] + [1] * (len(vocabulary()) - 3))
    writer.add_token_merges(["h e", "Ġ t"])
    for name, index in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(*as_llama_cpp(name, value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def test_a_converted_file_computes_what_the_model_computed(tmp_path: Path) -> None:
    model = tiny_model()
    write_tiny(tmp_path / "tiny.gguf", model)
    (tmp_path / "out").mkdir()
    smollm.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert again.config.tie_word_embeddings


def test_the_tokenizer_merges_and_knows_its_special_tokens(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", tiny_model())
    (tmp_path / "out").mkdir()
    smollm.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    words = vocabulary()
    ids = tokenizer("he the<|im_end|>", add_special_tokens=False).input_ids
    assert [words[index] for index in ids] == ["he", "Ġt", "he", "<|im_end|>"]
    assert tokenizer.decode(ids) == "he the<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he the"
    # Each digit is a token of its own and the space before it is one too.
    assert [words[index] for index in tokenizer(" 42", add_special_tokens=False).input_ids] == ["Ġ", "4", "2"]
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")


def test_unpermute_undoes_the_order() -> None:
    weight = torch.arange(16 * 3).reshape(16, 3)
    assert torch.equal(smollm.unpermute_rows(permuted(weight, 2), 2), weight)
    assert not torch.equal(permuted(weight, 2), weight)


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "rope_freqs.weight", "blk.0"])
def test_an_unknown_tensor_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="unknown GGUF tensor"):
        smollm.tensor_name(name)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", tiny_model(), architecture="phi3")
    with pytest.raises(CheckpointError, match="phi3"):
        smollm.convert_gguf(tmp_path / "tiny.gguf", tmp_path)
