"""Conversion of a GGUF file of a Llama model to a transformers folder (fp32 weights, tokenizer.json).

llama.cpp reorders the rows of each head of the query and key projections for its rotary embedding; the original order
is restored here. Quantized tensors are expanded; config and tokenizer are made from the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from llava.errors import CheckpointError
from llava.utils.lookup import require

BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

CONTROL_TOKEN = 3
"""Token type of GGUF for special tokens."""

DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
"""The two steps of SmolLM's pre-tokenizer (`tokenizer.ggml.pre = smollm`)."""


def convert_gguf(source: Path, target: Path) -> None:
    """Write the Llama folder of GGUF file `source` into the existing folder `target`.

    Raises:
        MissingDependency: package gguf is missing.
        CheckpointError: the architecture or a tensor is unknown.
    """
    gguf = require("gguf", "quickstart")
    reader = gguf.GGUFReader(str(source))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.model") != "gpt2":
        raise CheckpointError(
            f"{source}: got architecture {fields.get('general.architecture')!r} with tokenizer "
            f"{fields.get('tokenizer.ggml.model')!r}, expected 'llama' with 'gpt2'"
        )
    num_heads = int(fields["llama.attention.head_count"])
    num_key_heads = int(fields["llama.attention.head_count_kv"])
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weight = torch.from_numpy(values)
        name = tensor_name(tensor.name)
        if name.endswith("q_proj.weight"):
            weight = unpermute_rows(weight, num_heads)
        elif name.endswith("k_proj.weight"):
            weight = unpermute_rows(weight, num_key_heads)
        state[name] = weight.contiguous()
    config = llama_config(fields, tied="lm_head.weight" not in state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", config), *tokenizer_files(fields).items()):
        (target / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def tensor_name(name: str) -> str:
    """Return the transformers name of a GGUF tensor such as `blk.3.attn_q.weight`.

    Raises:
        CheckpointError: the name is unknown.
    """
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in OTHER_NAMES:
        return f"{OTHER_NAMES[parts[0]]}.{parts[1]}"
    raise CheckpointError(
        f"unknown GGUF tensor {name!r}; known: blk.N.{{{', '.join(BLOCK_NAMES)}}}, {list(OTHER_NAMES)}"
    )


def unpermute_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Restore the row order of a projection: per head, from llama.cpp's (pair, half) to (half, pair).

    Args:
        weight: [num_heads * head size, D].
        num_heads: number of heads of this projection.
    """
    rows, width = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def llama_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": int(fields["llama.embedding_length"]),
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": int(fields["llama.attention.head_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 10),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "dtype": "float32",
    }


def tokenizer_files(fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the contents of `tokenizer.json` and `tokenizer_config.json` (byte-level BPE)."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    special = [index for index, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN]
    return {
        "tokenizer.json": _tokenizer(fields, tokens, special),
        "tokenizer_config.json": _tokenizer_config(fields, tokens, special),
    }


def _tokenizer(fields: dict[str, Any], tokens: Sequence[str], special: Sequence[int]) -> dict[str, Any]:
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index in special
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(fields: dict[str, Any], tokens: Sequence[str], special: Sequence[int]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "additional_special_tokens": [tokens[index] for index in special],
        "chat_template": fields["tokenizer.chat_template"],
        "model_max_length": int(fields["llama.context_length"]),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
