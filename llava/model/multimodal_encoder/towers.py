"""Vision encoders and their image processors, from a folder, a hub name or open_clip files.

pixels [N, 3, H, W] --encoder--> hidden states [N, extra + P, Dv]    extra: class and register tokens
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    PreTrainedModel,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from llava.errors import WRONG_SETTINGS, CheckpointError, ConfigError
from llava.imaging.image_processor import load_image_processor
from llava.model.config_sizes import auto_config
from llava.model.multimodal_encoder.open_clip_encoder.loading import find_files, is_open_clip, load_trunk
from llava.model.multimodal_encoder.open_clip_encoder.trunks import open_clip_image_processor
from llava.model.torch_files.archive import check_torch_weights
from llava.model.torch_files.loading import MORE_THAN_TENSORS
from llava.utils.faults import start_of

CLASS_TOKEN_TOWERS = frozenset({"clip_vision_model", "dinov2", "dinov2_with_registers", "vit"})
"""Towers whose first token is a class token; others (SigLIP) have patch tokens only."""

UNUSED_PARTS = ("pooler", "head.", "post_layernorm", "visual_projection", "position_ids")
"""Parts of an encoder that its hidden states do not depend on; a checkpoint may lack them."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

MALFORMED = (*WRONG_SETTINGS, StrictDataclassError)
"""Exceptions of transformers for settings that make no sense."""

UNREADABLE = (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError, *MALFORMED)
"""Exceptions of transformers for folders that are absent, incomplete or broken, or whose settings make no sense."""

IMAGENET = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}

DEFAULT_PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip_vision_model": (CLIPImageProcessorPil, {}),
    "siglip_vision_model": (SiglipImageProcessorPil, {}),
    "dinov2": (BitImageProcessorPil, IMAGENET),
    "dinov2_with_registers": (BitImageProcessorPil, IMAGENET),
    "vit": (ViTImageProcessorPil, IMAGENET),
}
"""Image processor of a tower folder without preprocessor_config.json: the family's own normalization."""


def num_extra_tokens(vision_config: Any) -> int:
    """Return the number of class and register tokens before the patch tokens of a tower's hidden states."""
    has_class = int(vision_config.model_type in CLASS_TOKEN_TOWERS)
    return has_class + int(getattr(vision_config, "num_register_tokens", 0))


def load_tower(
    path: str, dtype: torch.dtype, *, config_file: str | None = None, checkpoint: str | None = None
) -> PreTrainedModel:
    """Load a vision encoder; of a two-tower model (CLIP, SigLIP, open_clip), the vision half.

    Args:
        path: folder, hub name, `hf-hub:` or `local-dir:` name; only a label if both files are given.
        dtype: dtype of the weights.
        config_file: open_clip model configuration.
        checkpoint: open_clip weights.

    Raises:
        CheckpointError: the model does not exist, has no vision encoder, or lacks weights.
        ConfigError: only one of the two files is given.
    """
    if is_open_clip(path, config_file, checkpoint) or config_file or checkpoint:
        return load_trunk(find_files(path, config_file, checkpoint), dtype)
    try:
        config = auto_config(path)
    except UNREADABLE as error:
        raise CheckpointError(f"vision tower {path} cannot be loaded: {first_line(error)}") from error
    vision_config = getattr(config, "vision_config", config)
    if not hasattr(vision_config, "patch_size") or type(vision_config) not in MODEL_MAPPING:
        raise CheckpointError(
            f"{path} ({config.model_type}) is not a vision tower; expected CLIP, SigLIP, DINOv2 or ViT"
        )
    tower = load_part(MODEL_MAPPING[type(vision_config)], path, dtype, may_lack=UNUSED_PARTS, config=vision_config)
    tower.eval()
    return tower


def load_part(
    model_class: Any, path: str, dtype: torch.dtype, *, may_lack: tuple[str, ...] = (), **keywords: Any
) -> PreTrainedModel:
    """Load a part with `from_pretrained`; missing weights are an error, not random numbers.

    Args:
        model_class: class with `from_pretrained`.
        path: folder or hub name.
        dtype: dtype of the weights.
        may_lack: fragments of the names of unused weights, which may be missing.
        keywords: passed to `from_pretrained`.

    Raises:
        CheckpointError: the part cannot be loaded, or weights are missing or of another shape.
    """
    check_torch_weights(Path(path))
    try:
        model, report = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **keywords)
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be loaded as {model_class.__name__}: {first_line(error)}") from error
    missing = sorted(
        name for name in report.get("missing_keys", ()) if not any(fragment in name for fragment in may_lack)
    )
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, for example {missing[0]}; "
            "expected a complete checkpoint of this type"
        )
    return cast(PreTrainedModel, model)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for one-line messages."""
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises to run the code in the file
        return MORE_THAN_TENSORS
    return start_of(error)


def tower_image_processor(
    path: str,
    vision_config: Any,
    image_size: int | None,
    *,
    config_file: str | None = None,
    checkpoint: str | None = None,
) -> Any:
    """Return the tower's image processor in its exact PIL form, for inputs of `image_size` pixels.

    Args:
        path: folder or hub name of the tower; without preprocessor_config.json the family's default is used.
        vision_config: configuration of the tower.
        image_size: pixels per side; None keeps the size of the tower's own processor.
        config_file: open_clip model configuration, as for `load_tower`.
        checkpoint: open_clip weights.

    Raises:
        CheckpointError: the processor's settings cannot be used.
        ConfigError: the size is not a multiple of the patch size.
    """
    if is_open_clip(path, config_file, checkpoint):
        files = find_files(path, config_file, checkpoint)
        processor: Any = open_clip_image_processor(files.model_config, files.preprocess)
    else:
        processor = _own_processor(path) or _default_processor(vision_config)
    if image_size is not None:
        _resize(processor, image_size)
    size, patch = input_size(processor), square_side(vision_config.patch_size)
    if size % patch:
        raise ConfigError(f"image size {size} is not a multiple of the tower's patch size {patch}; change --image-size")
    return processor


def _own_processor(path: str) -> Any | None:
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    try:
        return load_image_processor(path)
    except UNREADABLE as error:
        raise CheckpointError(f"{path} has no usable preprocessor_config.json: {first_line(error)}") from error


def _default_processor(vision_config: Any) -> Any:
    processor_class, settings = DEFAULT_PROCESSORS.get(vision_config.model_type, DEFAULT_PROCESSORS["vit"])
    processor = processor_class(**settings)
    _resize(processor, square_side(vision_config.image_size))
    return processor


def _resize(processor: Any, image_size: int) -> None:
    square = {"height": image_size, "width": image_size}
    if getattr(processor, "do_center_crop", False):
        processor.crop_size, processor.size = square, {"shortest_edge": image_size}
    else:
        processor.size = square


def input_size(image_processor: Any) -> int:
    """Return the pixels per side that an image processor produces."""
    crops = getattr(image_processor, "do_center_crop", False)
    size = image_processor.crop_size if crops else image_processor.size
    if isinstance(size, int):
        return size
    return int(size["height"] if "height" in size else size["shortest_edge"])


def square_side(size: Any) -> int:
    """Return one side of a square size, which configurations write as a number or as a pair."""
    return int(size if isinstance(size, int) else size[0])


def num_patches(image_processor: Any, vision_config: Any) -> int:
    """Return the number of patch tokens of one image."""
    return (input_size(image_processor) // square_side(vision_config.patch_size)) ** 2
