"""Keys of config.json in the legacy layouts (specification llava-med 1.4): used, kept, or unknown."""

from __future__ import annotations

from typing import Any

TEXT_TYPES = ("llama", "mistral")
"""Language models of the legacy layouts that are read; MPT was written for code that no longer exists."""

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
    }
)
"""Keys that decide something here."""

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
    }
)
"""Known keys of the legacy trainers that decide nothing when a model is loaded; kept and written back."""

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
    """Keys of a legacy config.json that nobody knows; they are kept and written back."""
    return sorted(set(config) - USED_KEYS - KEPT_KEYS - FOREIGN_KEYS - TEXT_KEYS)
