"""Read and write config.json of the legacy formats.

`LlavaMedConfig.source` keeps all of a legacy file, including keys that have no meaning here; writing starts from it.
"""

from __future__ import annotations

from typing import Any, cast

from transformers import AutoConfig

from llava.errors import CheckpointError
from llava.imaging.anyres import parse_pinpoints
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.legacy.checks import SELECT_STRATEGIES, legacy_refusals
from llava.model.checkpoint.legacy_keys import (
    ARCHITECTURES,
    FOREIGN_KEYS,
    KEPT_KEYS,
    PLUGINS_KEY,
    TEMPLATE_KEY,
    TEXT_TYPES,
    USED_KEYS,
)
from llava.model.checkpoint.plugged import plugins_of
from llava.model.config import LlavaMedConfig
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line


def text_config(checkpoint: Checkpoint) -> Any:
    """Return the configuration of the language model in a legacy config.json.

    Raises:
        CheckpointError: transformers rejects a setting.
    """
    ours = USED_KEYS | KEPT_KEYS | FOREIGN_KEYS
    settings = {key: value for key, value in checkpoint.config.items() if key not in ours}
    if settings.get("pad_token_id") is not None and settings["pad_token_id"] < 0:
        settings["pad_token_id"] = None
    try:
        return AutoConfig.for_model(checkpoint.text_type, **settings)
    except UNREADABLE as error:
        raise CheckpointError(f"{checkpoint.path}/config.json: {first_line(error)}") from error


def check_supported(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint would load into the model that was trained, see `legacy_refusals`.

    Raises:
        CheckpointError: it would not; the message has the first reason.
    """
    for reason in legacy_refusals(checkpoint):
        raise CheckpointError(f"{checkpoint.path}: {reason}")


def projector_settings(checkpoint: Checkpoint) -> tuple[str, dict[str, Any] | None]:
    """Return projector type and settings; weights take precedence over the configuration.

    Raises:
        CheckpointError: no known projector has these weights.
    """
    kind = checkpoint.projector_type or "linear"
    if kind != "cluster":
        return kind, None
    keys = {"mm_cluster_num_centers": "num_centers", "mm_cluster_iters": "num_iters"}
    settings = {ours: checkpoint.config[theirs] for theirs, ours in keys.items() if theirs in checkpoint.config}
    return kind, settings or None


def image_mode(config: dict[str, Any]) -> str:
    """Return the image mode."""
    return str(config.get("image_aspect_ratio") or "square")


def select_layer(checkpoint: Checkpoint) -> int:
    """Return the hidden state of the tower that is used; LLaVA-Med 1.0 omits the key for the last one."""
    return int(checkpoint.config.get("mm_vision_select_layer", -1))


def select_feature(checkpoint: Checkpoint) -> str:
    """Return `patch` or `cls_patch`."""
    return str(checkpoint.config.get("mm_vision_select_feature") or "patch")


def legacy_config(config: LlavaMedConfig, *, whole: bool) -> dict[str, Any]:
    """Return config.json in the legacy format: the model's original one, with its current settings.

    Args:
        config: the model's configuration.
        whole: it accompanies a whole model, and needs all settings of its language model.

    Raises:
        CheckpointError: the format cannot represent a part of the model.
    """
    source = config.source or {}
    text: Any = config.text_config
    if text.model_type not in TEXT_TYPES:
        raise CheckpointError(
            f"the legacy format holds {' and '.join(TEXT_TYPES)}, not {text.model_type}; use --to hf or keep our format"
        )
    written = dict(source.get("config") or {})
    if written.get(TEMPLATE_KEY) != config.template:
        written.pop(TEMPLATE_KEY, None)  # `keep_template` writes the current one if content does not imply it
    if not written or (whole and "hidden_size" not in written):
        written = {**_fresh(text), **written}  # that of a projector alone may lack the language model's settings
    layers = config.vision_feature_layer
    if isinstance(layers, list):
        raise CheckpointError(f"the legacy format selects one layer of the tower, not {layers}")
    feature = next(word for word, value in SELECT_STRATEGIES.items() if value == config.vision_feature_select_strategy)
    vision: Any = config.vision_config
    current: dict[str, Any] = {
        "use_mm_proj": True,
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": layers,
        "mm_vision_select_feature": feature,
        "mm_projector_type": config.projector_type,
        "mm_use_im_start_end": config.use_im_start_end,
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_patch_merge_type": config.patch_merge_type,
        "vocab_size": rows_to_keep(config),
    }
    defaults = {"mm_vision_select_feature": "patch", "mm_projector_type": "linear", "image_aspect_ratio": "square"}
    defaults["mm_patch_merge_type"] = "flat"
    for key, value in current.items():
        if key in written or not source or defaults.get(key) != value:
            written[key] = value
    if config.image_grid_pinpoints and not same_pinpoints(written, config.image_grid_pinpoints):
        written["image_grid_pinpoints"] = config.image_grid_pinpoints
    written.pop(PLUGINS_KEY, None)
    if names := plugins_of(config):
        written[PLUGINS_KEY] = names
    return written | _projector_keys(config.projector_kwargs or {})


def _projector_keys(settings: dict[str, Any]) -> dict[str, int]:
    """Return the projector's settings under their legacy names; empty if it has none.

    Raises:
        CheckpointError: the format has no name for a setting.
    """
    if beyond := sorted(set(settings) - {"num_centers", "num_iters"}):
        raise CheckpointError(
            f"the legacy format has no key for the projector's {', '.join(beyond)}; keep our format, which has"
        )
    if not settings:
        return {}
    return {
        "mm_cluster_num_centers": settings.get("num_centers", 256),
        "mm_cluster_iters": settings.get("num_iters", 2),
    }


def rows_to_keep(config: LlavaMedConfig) -> int:
    """Return the vocabulary rows in the legacy format: the source's, unless tokens were added since.

    The row of our placeholder is left out if it is the last; the original code does not use this token.
    """
    rows = int(cast(Any, config.text_config).vocab_size)
    source = config.source or {}
    if source.get("num_rows") and rows == source.get("loaded_rows", rows):
        return int(source["num_rows"])
    return rows - 1 if config.image_token_id == rows - 1 else rows


def same_pinpoints(written: dict[str, Any], pinpoints: list[list[int]]) -> bool:
    """Return whether a file has these sizes already; files hold them as a list or as its text."""
    given = written.get("image_grid_pinpoints")
    return bool(given) and [list(size) for size in parse_pinpoints(given, 0)] == pinpoints


def _fresh(text: Any) -> dict[str, Any]:
    """Return a legacy config.json for a model that never had one."""
    settings = cast(dict[str, Any], text.to_diff_dict())
    parameters = settings.pop("rope_parameters", None) or {}
    settings["rope_theta"] = parameters.get("rope_theta", 10000.0)
    if parameters.get("rope_type", "default") != "default":
        settings["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    settings.pop("_name_or_path", None)
    if dtype := settings.pop("dtype", None):
        settings["torch_dtype"] = dtype  # as every version of transformers reads it
    return {
        **settings,
        **{"model_type": f"llava_{text.model_type}", "architectures": [ARCHITECTURES[text.model_type]]},
        **{"hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size},
        **{"num_hidden_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads},
        **{"mm_use_im_patch_token": False, "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False},
    }
