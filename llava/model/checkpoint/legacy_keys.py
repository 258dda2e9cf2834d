"""Keys of config.json in the legacy formats: used, kept, or unknown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError

TEXT_TYPES = ("llama", "mistral")
"""Language models that are read in the legacy formats; MPT was written for code that no longer exists."""

ARCHITECTURES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}
"""The original trainers' classes, by the language model's type."""

TEMPLATE_KEY = "llava_template"
"""Our own key: the conversation template, if a checkpoint's content does not imply it; other code ignores it."""

PLUGINS_KEY = "llava_plugins"
"""Our own key: names of the plug-ins that added its projector or template; other code ignores it."""

TOWER_KEYS = ("mm_vision_tower", "mm_vision_tower_config", "mm_vision_tower_checkpoint")
"""Keys that name the vision tower: a hub name, or a folder or file, which may be inside the checkpoint."""

USED_KEYS = frozenset(
    {
        "mm_vision_tower",
        "mm_vision_tower_config",
        "mm_vision_tower_checkpoint",
        "mm_hidden_size",
        "mm_vision_select_layer",
        "mm_vision_select_feature",
        "mm_projector_type",
        "mm_cluster_num_centers",
        "mm_cluster_iters",
        "mm_use_im_start_end",
        "mm_use_im_patch_token",
        "mm_patch_merge_type",
        "image_aspect_ratio",
        "image_grid_pinpoints",
        "max_sequence_length",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        TEMPLATE_KEY,
        PLUGINS_KEY,
    }
)
"""Keys that change how a checkpoint is loaded."""

KEPT_KEYS = frozenset(
    {
        "use_mm_proj",
        "tune_mm_mlp_adapter",
        "freeze_mm_mlp_adapter",
        "mm_projector_lr",
        "mm_vision_tower_lr",
        "vision_tower_lr",
        "unfreeze_mm_vision_tower",
        "mm_resampler_type",
        "num_latents",
        "qav_loss",
        "loss_alpha",
        "s2",
        "tune_mm_vision_resampler",
        "freeze_mm_vision_resampler",
        "image_crop_resolution",
        "image_split_resolution",
        "sep_image_conv_front",
        "max_length",
    }
)
"""Known keys of the legacy trainers that do not affect loading; kept and written back."""

FOREIGN_KEYS = frozenset(
    {"model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "auto_map"}
)
TEXT_KEYS = frozenset(
    {
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "vocab_size"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "rope_theta", "rope_scaling"),
        *("rope_parameters", "attention_bias", "attention_dropout", "mlp_bias", "head_dim", "pretraining_tp"),
        "sliding_window",
    }
)
"""Keys of the language models themselves, which transformers reads."""


def unknown_keys(config: dict[str, Any]) -> list[str]:
    """Return the unknown keys of a legacy config.json, which are kept and written back."""
    return sorted(set(config) - USED_KEYS - KEPT_KEYS - FOREIGN_KEYS - TEXT_KEYS)


def merge_type(config: Mapping[str, Any]) -> str:
    """Return how the tiles of the `anyres` mode are joined; by default, one after the other."""
    return str(config.get("mm_patch_merge_type") or "flat")


LARGEST_COUNT = 1_000_000
COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("mm_hidden_size", "vocab_size", "mm_cluster_num_centers", "mm_cluster_iters", "max_sequence_length"),
)
TEXTS = (
    *(*TOWER_KEYS, TEMPLATE_KEY, "mm_projector_type", "model_type"),
    *("mm_vision_select_feature", "mm_patch_merge_type", "image_aspect_ratio", "_name_or_path"),
)
SWITCHES = ("mm_use_im_start_end", "mm_use_im_patch_token", "tie_word_embeddings", "tune_mm_mlp_adapter")
OPTIONAL_COUNTS = frozenset(COUNTS[4:])


def check_values(config: Mapping[str, Any], file: Path) -> None:
    """Check the types of the values in a legacy config.json; a string is not a switch.

    Raises:
        CheckpointError: a value has another type; names the key, the value and what was expected.
    """
    for key in (*COUNTS, *TEXTS, *SWITCHES, "mm_vision_select_layer"):
        if key in config and (expected := _expected(key, config[key])):
            raise CheckpointError(f"{file}: {key} is {str(config[key])[:60]!r}; expected {expected}")


def _expected(key: str, value: Any) -> str | None:
    """Return what a value should have been, or None if it is valid."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if key == "mm_vision_select_layer":
        return None if is_number else "a whole number"
    if value is None and (key in OPTIONAL_COUNTS or key in TEXTS or key in SWITCHES):
        return None
    if key in COUNTS:
        return None if is_number and 0 < value <= LARGEST_COUNT else f"a whole number from 1 to {LARGEST_COUNT}"
    if key in TEXTS:
        return None if isinstance(value, str) else "text"
    return None if isinstance(value, bool) else "true or false"


_LARGE = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu"},
}
PUBLISHED_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {**_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_LARGE, "image_size": 336},
}
