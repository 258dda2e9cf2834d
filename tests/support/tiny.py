"""Tiny random parts and data: two layers, width 32, byte-level tokens, 28-pixel images, no downloads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    ViTConfig,
)

from llava.model.builder import LoadedModel, build_model

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

LANGUAGE_MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
}
TOWERS: dict[str, tuple[type, dict[str, Any]]] = {
    "clip": (CLIPVisionConfig, {}),
    "siglip": (SiglipVisionConfig, {}),
    "dinov2": (Dinov2Config, {"mlp_ratio": 2}),
    "vit": (ViTConfig, {}),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that has every byte and starts each text with `<s>`."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    return tokenizer


def write_tiny_lm(path: Path, lm: str = "llama", *, tie: bool = False, seed: int = 0, **overrides: Any) -> Path:
    """Write a folder for `--model-name-or-path`."""
    tokenizer = byte_tokenizer()
    config_class, extra = LANGUAGE_MODELS[lm]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["max_position_embeddings"] = 2048
    config = config_class(
        vocab_size=len(tokenizer),
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        **{**sizes, **extra, **overrides},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_tiny_tower(path: Path, tower: str = "clip", *, image_size: int = 28, seed: int = 1) -> Path:
    """Write a folder for `--vision-tower` with patches of 14 pixels."""
    config_class, extra = TOWERS[tower]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = config_class(image_size=image_size, patch_size=14, initializer_range=0.2, **{**sizes, **extra})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModel.from_config(config).save_pretrained(path)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(path)
    return path


def tiny_llava(
    projector: str = "mlp2x_gelu",
    tower: str = "clip",
    lm: str = "llama",
    *,
    template: str = "vicuna_v1",
    image_size: int = 28,
    build_size: int | None = None,
    tie: bool = False,
    seed: int = 0,
    lm_sizes: dict[str, Any] | None = None,
    **options: Any,
) -> LoadedModel:
    """Return a random model with four image tokens.

    `image_size` is the tower's, `build_size` the model's input where it differs; `lm_sizes` change the language model's
    configuration; `options` are those of `build`.
    """
    with TemporaryDirectory() as folder:
        lm_path = write_tiny_lm(Path(folder) / "lm", lm, tie=tie, seed=seed, **(lm_sizes or {}))
        tower_path = write_tiny_tower(Path(folder) / "tower", tower, image_size=image_size, seed=seed + 1)
        options = {"projector_type": projector, "template": template, "image_size": build_size, "seed": seed, **options}
        loaded = build_model(str(lm_path), str(tower_path), **options)
    loaded.model.eval()
    return loaded


def tiny_image(seed: int, size: int = 28) -> Image.Image:
    """Return an image of random blocks that depends on the seed."""
    draw = random.Random(seed)
    small = Image.new("RGB", (4, 4))
    small.putdata([tuple(draw.randrange(256) for _ in range(3)) for _ in range(16)])
    return small.resize((size, size), Image.Resampling.NEAREST)


def write_tiny_vqa(path: Path, num_images: int = 3, questions_per_image: int = 4, *, seed: int = 0) -> Path:
    """Write a LLaVA-format folder, `train.json` and `images/`, with answers of very different lengths."""
    draw = random.Random(seed)
    (path / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_images):
        tiny_image(seed * 1000 + number).save(path / "images" / f"{number}.png")
        for question in range(questions_per_image):
            answer = draw.choice(["yes", "no"]) if question % 2 else "a b c d e f "[: draw.randrange(2, 12)].strip()
            turns = [
                {"from": "human", "value": f"<image>\nQuestion {question} of {number}?"},
                {"from": "gpt", "value": answer},
            ]
            kind = "CLOSED" if question % 2 else "OPEN"
            row_id = f"{number}-{question}"
            rows.append({"id": row_id, "image": f"{number}.png", "answer_type": kind, "conversations": turns})
    (path / "train.json").write_text(json.dumps(rows))
    return path
