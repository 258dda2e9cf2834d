"""Random checkpoints for `checkpoint_io`: a base with its delta, and one model in two formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks import common
from benchmarks.eval_throughput import make_processor
from llava.model.builder import LoadedModel
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.files.shard_writer import ShardWriter
from llava.model.checkpoint.files.shards import open_tensors
from llava.model.checkpoint.legacy.export import export_legacy
from llava.model.checkpoint.tools import delta
from llava.model.config import LlavaMedConfig
from llava.model.modeling import LlavaMedForConditionalGeneration

NUM_NEW_TOKENS = 3
DEVIATION, CHANGE = 0.02, 0.001


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the models, and largest size of a shard."""

    width: int
    num_layers: int
    max_shard_bytes: int

    def language_model(self, num_rows: int) -> LlamaConfig:
        """Return a configuration with the proportions of Llama and an untied head."""
        return LlamaConfig(
            vocab_size=num_rows,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.width // 128,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=common.BOS_TOKEN_ID,
            eos_token_id=2,
            pad_token_id=common.PAD_TOKEN_ID,
            dtype="float16",
        )


FULL = Sizes(width=2048, num_layers=17, max_shard_bytes=500 * 10**6)
"""1.0 billion parameters."""
QUICK = Sizes(width=1024, num_layers=4, max_shard_bytes=50 * 10**6)
"""0.12 billion parameters."""


def _shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, rows = config.hidden_size, config.intermediate_size, config.vocab_size
    yield "model.embed_tokens.weight", (rows, width)
    for layer in range(config.num_hidden_layers):
        place = f"model.layers.{layer}."
        for name in "qkvo":
            yield f"{place}self_attn.{name}_proj.weight", (width, width)
        yield f"{place}mlp.gate_proj.weight", (inner, width)
        yield f"{place}mlp.up_proj.weight", (inner, width)
        yield f"{place}mlp.down_proj.weight", (width, inner)
        yield f"{place}input_layernorm.weight", (width,)
        yield f"{place}post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (rows, width)


def random_half(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> Tensor:
    """Return a float16 tensor of normally distributed values."""
    return torch.empty(shape).normal_(0.0, deviation, generator=generator).half()


def write_pair(folder: Path, sizes: Sizes, *, safe: bool) -> tuple[Path, Path]:
    """Write a base and the delta of a model with three more tokens; return their folders."""
    base, target, made = folder / "base", folder / "target", folder / "delta"
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(base, max_shard_bytes=sizes.max_shard_bytes, safe=safe) as writer:
        for name, shape in _shapes(sizes.language_model(common.VOCABULARY)):
            writer.add(name, random_half(shape, DEVIATION, generator))
    grown = sizes.language_model(common.VOCABULARY + NUM_NEW_TOKENS)
    with open_tensors(base) as reader, ShardWriter(target, max_shard_bytes=sizes.max_shard_bytes) as writer:
        for name, shape in _shapes(grown):
            tensor = random_half(shape, CHANGE, generator)
            known = reader.read(name)
            tensor[: known.shape[0]] += known
            writer.add(name, tensor)
    _write_config(base, sizes.language_model(common.VOCABULARY))
    _write_config(target, grown)
    delta.write_delta(base, target, made, delta.WriteOptions(max_shard_bytes=sizes.max_shard_bytes, safe=safe))
    return base, made


def _write_config(folder: Path, config: LlamaConfig) -> None:
    settings = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(settings))


def write_models(folder: Path, sizes: Sizes, *, safe: bool) -> tuple[Path, Path]:
    """Write a random model in the format of the originals and of transformers; return the folders."""
    loaded = _random_model(sizes)
    legacy, hf = folder / "legacy", folder / "hf"
    export_legacy(loaded, legacy, safe=safe, max_shard_bytes=sizes.max_shard_bytes)
    export_hf(loaded, hf, max_shard_bytes=sizes.max_shard_bytes)
    if not safe:
        with open_tensors(hf) as reader, ShardWriter(hf, max_shard_bytes=sizes.max_shard_bytes, safe=False) as writer:
            for name, tensor in reader:
                writer.add(name, tensor)
    return legacy, hf


def _random_model(sizes: Sizes) -> LoadedModel:
    values: dict[str, Any] = common.config_values()
    values["text_config"] = sizes.language_model(common.VOCABULARY)
    vision: CLIPVisionConfig = values["vision_config"]
    config = LlavaMedConfig(projector_type="mlp2x_gelu", **{**values, "vision_config": vision}, dtype="float16")
    with torch.device("meta"):
        model = LlavaMedForConditionalGeneration(config).half()
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(random_half(tuple(parameter.shape), DEVIATION, generator))
    return LoadedModel(model, make_processor(), 2048)
