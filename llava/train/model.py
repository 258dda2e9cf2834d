"""Model of a training run: a loaded checkpoint, or a new one from language model and vision tower."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llava.errors import ConfigError
from llava.model.anyres import use_policy
from llava.model.builder import LoadedModel, build_model, portable_path
from llava.model.checkpoint.files.shards import find_weights
from llava.model.checkpoint.formats import ADAPTER_CONFIG_FILE, ORIGIN_FILE, OUR_KINDS, PROJECTOR_FILES, Checkpoint
from llava.model.checkpoint.hub import hub_config, is_hub_name, local_folder
from llava.model.checkpoint.load import PART_FLAGS, USED_PARTS, load_checkpoint, read_origin
from llava.model.checkpoint.load_parts import load_projector
from llava.model.quantization import Quantization
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.utils.cli import flag

logger = logging.getLogger(__name__)

NEW_MODEL_TEMPLATE = "v0"
"""Template of a new model without `--version`, as in the original trainers."""

NEW_MODEL_IMAGE_MODE = "square"
"""Image mode of a new model without `--image-aspect-ratio`, as in the original trainers."""

DTYPE = torch.float32
"""Data type of loaded weights; bf16 and fp16 runs use autocast (see `llava.train.precision`)."""


def open_model(model_args: ModelArguments, data_args: DataArguments, args: LlavaTrainingArguments) -> LoadedModel:
    """Load or build the model of a run, with its template, image mode and initial projector.

    Raises:
        ConfigError: a new model has no `--vision-tower`, or options contradict the checkpoint.
        CheckpointError: a part cannot be loaded.
    """
    system = Path(model_args.system_file).read_text(encoding="utf-8").strip() if model_args.system_file else None
    if holds_tower_and_projector(model_args.model_name_or_path):
        loaded = _continue(model_args, data_args, system)
    else:
        loaded = _build(model_args, data_args, args, system)
    processor = loaded.processor
    processor.use_dicom(processor.dicom.changed(data_args.dicom_window, data_args.dicom_frame))
    processor.use_fast_jpeg(data_args.fast_jpeg)
    if model_args.pretrain_mm_mlp_adapter:
        load_projector(loaded.model, model_args.pretrain_mm_mlp_adapter)
    return loaded


def holds_tower_and_projector(path: str) -> bool:
    """Return whether a folder or hub name holds more than a language model, in any checkpoint format.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    if is_hub_name(path):
        return bool(hub_config(path).keys() & {"mm_vision_tower", "vision_config"})
    folder = Path(path)
    has_part = any((folder / name).is_file() for name in (ORIGIN_FILE, ADAPTER_CONFIG_FILE, *PROJECTOR_FILES))
    return has_part or (find_weights(folder) is not None and Checkpoint.open(folder).kind != "language_model")


def _continue(model_args: ModelArguments, data_args: DataArguments, system: str | None) -> LoadedModel:
    """Load a checkpoint of any format, then apply a given template, system prompt and image mode."""
    path = model_args.model_name_or_path
    loaded = load_checkpoint(path, dtype=DTYPE, **asdict(quantization_of(model_args)), **_tower_parts(model_args))
    check_against(loaded, model_args)
    if model_args.version or system:
        name = model_args.version or loaded.processor.template.name
        if loaded.processor.system is not None and system is None and name != loaded.processor.template.name:
            logger.warning(
                "--version %s: the system prompt of the checkpoint is replaced by that of the template", name
            )
        loaded.processor.use_template(name, system=system)
        loaded.model.config.template = name
    asked = data_args.image_aspect_ratio, model_args.mm_patch_merge_type, data_args.image_grid_pinpoints
    if any(asked):
        mode, merge, pinpoints = asked
        loaded.processor.use_image_mode(mode or loaded.processor.image_mode, merge=merge, pinpoints=pinpoints)
        use_policy(loaded.model, loaded.processor)
    return loaded


def _tower_parts(model_args: ModelArguments) -> dict[str, Any]:
    """Return the vision tower options for checkpoints that may need them."""
    # Published commands set --vision_tower for every checkpoint.
    path = model_args.model_name_or_path
    names = ("vision_tower", "vision_tower_config", "vision_tower_checkpoint")
    given = {name: value for name in names if (value := getattr(model_args, name)) is not None}
    folder = local_folder(path) if is_hub_name(path) else path
    kind = Checkpoint.open(folder).kind if given else "legacy"
    if "vision_tower" in USED_PARTS.get(kind, PART_FLAGS):
        return given
    if kind not in OUR_KINDS:  # for our formats, `check_against` compares the tower
        logger.warning("%s is ignored: %s holds its vision tower", ", ".join(map(flag, given)), path)
    return {}


def check_against(loaded: LoadedModel, model_args: ModelArguments) -> None:
    """Warn of options that apply to new models only and differ from the loaded checkpoint.

    Raises:
        ConfigError: image markers are requested, but the checkpoint was trained without them.
    """
    config = loaded.model.config
    if model_args.mm_use_im_start_end and not config.use_im_start_end:
        raise ConfigError(
            f"--mm-use-im-start-end: {model_args.model_name_or_path} was trained without marker tokens; omit the flag, "
            "or train stage 1 with it"
        )
    earlier = read_origin(model_args.model_name_or_path).get("build", {})
    tower = model_args.vision_tower
    decided = {
        "vision_tower": (portable_path(tower) if tower else None, earlier.get("vision_tower"), None),
        "mm_projector_type": (model_args.mm_projector_type, config.projector_type, "linear"),
        "mm_vision_select_layer": (model_args.mm_vision_select_layer, config.vision_feature_layer, -2),
        "mm_vision_select_feature": (model_args.mm_vision_select_feature, earlier.get("select_feature"), "patch"),
        "mm_use_im_patch_token": (model_args.mm_use_im_patch_token, earlier.get("use_im_patch_token"), False),
        "image_size": (model_args.image_size, loaded.processor.image_size[0], None),
    }
    for name, (given, kept, default) in decided.items():
        if kept is not None and given not in (default, kept):
            path = model_args.model_name_or_path
            logger.warning("%s %s is ignored: %s was built with %s", flag(name), given, path, kept)


@contextmanager
def whole_weights(args: LlavaTrainingArguments) -> Iterator[None]:
    """Context in which every rank builds the whole model; ZeRO-3 shards it when the trainer starts."""
    # New embeddings are means of old ones, and new projectors depend on the seed: both need whole weights.
    config = getattr(args, "hf_deepspeed_config", None)  # set only with --deepspeed
    if config is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def quantization_of(model_args: ModelArguments) -> Quantization:
    """Return the quantization options of the language model."""
    return Quantization(model_args.bits, model_args.double_quant, model_args.quant_type)


def _build(
    model_args: ModelArguments, data_args: DataArguments, args: LlavaTrainingArguments, system: str | None
) -> LoadedModel:
    if model_args.vision_tower is None:
        raise ConfigError(
            f"{model_args.model_name_or_path} is not a llava checkpoint, so it is treated as a language model. "
            "Pass --vision-tower."
        )
    return build_model(
        model_args.model_name_or_path,
        model_args.vision_tower,
        dtype=DTYPE,
        vision_tower_config=model_args.vision_tower_config,
        vision_tower_checkpoint=model_args.vision_tower_checkpoint,
        projector_type=model_args.mm_projector_type,
        projector_kwargs=model_args.projector_kwargs,
        select_layer=model_args.mm_vision_select_layer,
        select_feature=model_args.mm_vision_select_feature,
        use_im_start_end=model_args.mm_use_im_start_end,
        use_im_patch_token=model_args.mm_use_im_patch_token,
        template=model_args.version or NEW_MODEL_TEMPLATE,
        image_mode=data_args.image_aspect_ratio or NEW_MODEL_IMAGE_MODE,
        patch_merge_type=model_args.mm_patch_merge_type or "flat",
        image_grid_pinpoints=data_args.image_grid_pinpoints,
        system=system,
        image_size=model_args.image_size,
        **asdict(quantization_of(model_args)),
        seed=args.seed,
    )
