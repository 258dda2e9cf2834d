"""The weights that a whole model of any layout must have, by its configuration: our names and shapes.

config.json --expected_shapes--> model.language_model.layers.0.self_attn.q_proj.weight (4096, 4096), ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llava.errors import CheckpointError
from llava.model.checkpoint.formats import Layout
from llava.model.checkpoint.legacy_keys import merge_type
from llava.model.checkpoint.weight_names import EMBEDDINGS, NEWLINE, PROJECTOR

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": dict(zip(SIZES, (4096, 11008, 32, 32), strict=True)),
    "mistral": {**dict(zip(SIZES, (4096, 14336, 32, 32), strict=True)), "num_key_value_heads": 8},
}
"""What transformers takes where a configuration inside another leaves a size out, as published ones do."""


def expected_shapes(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The language model's and the projector's weights by our names, with shapes; -1 is any size.

    Only for whole models around Llama or Mistral, whose configuration says it all.
    """
    config = _text_settings(layout)
    if not all(isinstance(config.get(key), int) for key in SIZES):
        return
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    keys = config.get("num_key_value_heads") or heads
    yield EMBEDDINGS, (-1, width)
    model = EMBEDDINGS.removesuffix("embed_tokens.weight")
    for layer in range(config["num_hidden_layers"]):
        place = f"{model}layers.{layer}."
        for name in ("q", "k", "v"):
            yield f"{place}self_attn.{name}_proj.weight", ((heads if name == "q" else keys) * size, width)
        yield f"{place}self_attn.o_proj.weight", (width, heads * size)
        for name in ("gate", "up"):
            yield f"{place}mlp.{name}_proj.weight", (inner, width)
        yield f"{place}mlp.down_proj.weight", (width, inner)
        for name in ("input", "post_attention"):
            yield f"{place}{name}_layernorm.weight", (width,)
    yield f"{model}norm.weight", (width,)
    if _has_head(layout):
        yield "lm_head.weight", (-1, width)
    yield from _expected_projector(layout, width)
    merge = merge_type(config) if layout.kind == "legacy" else layout.config.get("patch_merge_type")
    if merge == "spatial_unpad":
        yield f"model.{NEWLINE}", (width,)


def _text_settings(layout: Layout) -> dict[str, Any]:
    """The language model's settings; empty where they are not here, or of a type whose weights have other names."""
    if layout.kind == "legacy":
        return layout.config
    inner = layout.config.get("text_config")
    if (
        layout.kind not in ("model", "hf_llava")
        or not isinstance(inner, dict)
        or inner.get("model_type") not in DEFAULTS
    ):
        return {}
    return {**DEFAULTS[inner["model_type"]], **inner}


def _has_head(layout: Layout) -> bool:
    """Whether the head is a table of its own: legacy configurations say where it is none, others where it is one."""
    tied = layout.config.get("tie_word_embeddings")
    return not tied if layout.kind == "legacy" else tied is False


def _expected_projector(layout: Layout, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weights of the projector that the weights are of; where they are of none, of the one that the settings name."""
    config = layout.config
    if layout.kind == "legacy":
        vision, written = config.get("mm_hidden_size") or -1, str(config.get("mm_projector_type") or "linear")
    else:
        vision, written = -1, str(config.get("projector_type") or "mlp2x_gelu")
    try:
        kind = written if layout.kind != "legacy" else layout.projector_type or written
    except CheckpointError:
        kind = written
    if kind == "linear":
        yield f"{PROJECTOR}weight", (width, vision)
        yield f"{PROJECTOR}bias", (width,)
    elif match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        for layer in range(int(match[1])):
            yield f"{PROJECTOR}{2 * layer}.weight", (width, width if layer else vision)
            yield f"{PROJECTOR}{2 * layer}.bias", (width,)
    elif kind == "cluster":
        for name in ("sim_alpha", "sim_beta"):
            yield PROJECTOR + name, (1, 1, 1)
        for name in ("c", "v", "f"):
            yield f"{PROJECTOR}{name}.weight", (vision, vision)
            yield f"{PROJECTOR}{name}.bias", (vision,)
        for name, shape in (("ln_1", (vision,)), ("mlp.0", (width, vision)), ("mlp.2", (width, width))):
            yield f"{PROJECTOR}{name}.weight", shape
            yield f"{PROJECTOR}{name}.bias", shape[:1]
