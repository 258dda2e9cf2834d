"""Model of a training run: a loaded checkpoint, or a new one from language model and vision tower."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from llava.errors import ConfigError
from llava.jinja_template import AUTO, read_template
from llava.model.anyres import use_policy
from llava.model.builder import LoadedModel, build_model, portable_path
from llava.model.checkpoint.files.shards import find_weights
from llava.model.checkpoint.finite import check_finite
from llava.model.checkpoint.folder import check_links
from llava.model.checkpoint.formats import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    ORIGIN_FILE,
    OUR_KINDS,
    PROJECTOR_FILES,
    Checkpoint,
    read_json,
)
from llava.model.checkpoint.hub import hub_config, is_hub_name
from llava.model.checkpoint.load import PART_FLAGS, USED_PARTS, load_checkpoint, open_checkpoint, read_origin
from llava.model.checkpoint.load_parts import load_projector
from llava.model.multimodal_encoder.towers import MALFORMED
from llava.train.specs import ModelSpec
from llava.utils.cli import flag
from llava.utils.faults import sensible
from llava.utils.jsonl import read_text

logger = logging.getLogger(__name__)

NEW_MODEL_TEMPLATE = "v0"
"""Template of a new model without `--version`, as in the original trainers."""

NEW_MODEL_IMAGE_MODE = "square"
"""Image mode of a new model without `--image-aspect-ratio`, as in the original trainers."""

DTYPE = torch.float32
"""Data type of loaded weights; bf16 and fp16 runs use autocast (see `llava.train.precision`)."""


def open_model(spec: ModelSpec) -> LoadedModel:
    """Load or build the model of a run, with its template, image mode and initial projector.

    Raises:
        ConfigError: a new model has no `--vision-tower`, or options contradict the checkpoint.
        CheckpointError: a part cannot be loaded, holds a link out of its folder, or a weight is not finite.
    """
    check_part_links(spec)
    system = read_text(spec.system_file).strip() if spec.system_file else None
    checkpoint = find_checkpoint(spec.path) if spec.found is None else spec.found.checkpoint
    if checkpoint is None:
        with sensible(f"{spec.path} and {spec.vision_tower}", "joined", MALFORMED):
            loaded = _build(spec, system)
    else:
        loaded = _continue(checkpoint, spec, system)
    processor = loaded.processor.changed(
        dicom=loaded.processor.dicom.changed(spec.dicom_window, spec.dicom_frame),
        fast_jpeg=spec.fast_jpeg,
        trains_empty=spec.trains_empty,
    )
    if spec.projector_weights:
        load_projector(loaded.model, spec.projector_weights)
    check_finite(loaded.model.named_parameters(), spec.path)
    return replace(loaded, processor=processor)


def check_part_links(spec: ModelSpec) -> None:
    """Check the links of the folders that a run reads, also of the bases of adapters and projectors.

    Settings of configuration, tokenizer and image processor are saved with the trained model, also unknown ones.

    Raises:
        CheckpointError: a link leads out of its folder.
    """
    parts: list[Any] = [spec.path, spec.vision_tower]
    checked: set[Path] = set()
    while parts:
        part = parts.pop()
        if not isinstance(part, str) or not Path(part).is_dir() or (folder := Path(part).resolve()) in checked:
            continue
        check_links(Path(part))
        checked.add(folder)
        parts += _named_parts(Path(part))


def _named_parts(folder: Path) -> list[Any]:
    """Return the base, the parts and the tower that the files of a checkpoint name."""
    origin, config = read_origin(folder), read_json(folder / CONFIG_FILE)
    named: list[Any] = [config.get("mm_vision_tower")]
    if origin.get("kind") in ("adapter", "projector"):
        build = origin.get("build")
        named += [origin.get("base"), *(build.values() if isinstance(build, dict) else ())]
    elif any((folder / name).is_file() for name in (ADAPTER_CONFIG_FILE, *PROJECTOR_FILES)):
        adapter = read_json(folder / ADAPTER_CONFIG_FILE)
        bases = [adapter.get("base_model_name_or_path"), config.get("_name_or_path")]
        named += [place for base in bases if isinstance(base, str) for place in (base, str(folder / base))]
    return named


def find_checkpoint(path: str) -> Checkpoint | None:
    """Open a folder or hub name that holds more than a language model, in any format; None for all others.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    if is_hub_name(path):
        holds_more = bool(hub_config(path).keys() & {"mm_vision_tower", "vision_config"})
        return open_checkpoint(path) if holds_more else None
    folder = Path(path)
    has_part = any((folder / name).is_file() for name in (ORIGIN_FILE, ADAPTER_CONFIG_FILE, *PROJECTOR_FILES))
    if not has_part and find_weights(folder) is None:
        return None
    checkpoint = Checkpoint.open(folder)
    return checkpoint if has_part or checkpoint.kind != "language_model" else None


def _continue(checkpoint: Checkpoint, spec: ModelSpec, system: str | None) -> LoadedModel:
    """Load a checkpoint of any format, then apply a given template, system prompt and image mode."""
    parts = _tower_parts(checkpoint, spec)
    loaded = load_checkpoint(checkpoint, dtype=DTYPE, **asdict(spec.quantization), **parts)
    check_against(loaded, spec)
    processor = loaded.processor
    name, text = template_of(spec)
    name = processor.template.name if name == AUTO and text is None else name
    if name or system:
        name = name or processor.template.name
        if processor.system is not None and system is None and name != processor.template.name:
            logger.warning(
                "--version %s: the system prompt of the checkpoint is replaced by that of the template", name
            )
        processor = processor.changed(template=name, chat_template=text, system=system)
        loaded.model.config.template = name
    if spec.image_mode or spec.patch_merge_type or spec.image_grid_pinpoints:
        processor = processor.changed(
            image_mode=spec.image_mode or processor.image_mode,
            patch_merge_type=spec.patch_merge_type,
            image_grid_pinpoints=spec.image_grid_pinpoints,
        )
        use_policy(loaded.model, processor)
    return replace(loaded, processor=processor)


def template_of(spec: ModelSpec) -> tuple[str | None, str | None]:
    """Return the template name, and for `--version FILE.jinja` the text that the tokenizer then holds.

    Raises:
        ConfigError: the file does not exist.
    """
    if spec.template is not None and spec.template.endswith(".jinja"):
        return AUTO, read_template(spec.template)
    return spec.template, None


def _tower_parts(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
    """Return the vision tower options for checkpoints that may need them."""
    # Published commands set --vision_tower for every checkpoint.
    names = ("vision_tower", "vision_tower_config", "vision_tower_checkpoint")
    given = {name: value for name in names if (value := getattr(spec, name)) is not None}
    if not given or "vision_tower" in USED_PARTS.get(checkpoint.kind, PART_FLAGS):
        return given
    if checkpoint.kind not in OUR_KINDS:  # for our formats, `check_against` compares the tower
        logger.warning("%s is ignored: %s holds its vision tower", ", ".join(map(flag, given)), spec.path)
    return {}


def check_against(loaded: LoadedModel, spec: ModelSpec) -> None:
    """Warn of options that apply to new models only and differ from the loaded checkpoint.

    Raises:
        ConfigError: image markers are requested, but the checkpoint was trained without them.
    """
    config = loaded.model.config
    if spec.use_im_start_end and not config.use_im_start_end:
        raise ConfigError(
            f"--mm-use-im-start-end: {spec.path} was trained without marker tokens; omit the flag, "
            "or train stage 1 with it"
        )
    earlier = read_origin(spec.path).get("build", {})
    tower = spec.vision_tower
    decided = {
        "vision_tower": (portable_path(tower) if tower else None, earlier.get("vision_tower"), None),
        "mm_projector_type": (spec.projector_type, config.projector_type, "linear"),
        "mm_vision_select_layer": (spec.select_layer, config.vision_feature_layer, -2),
        "mm_vision_select_feature": (spec.select_feature, earlier.get("select_feature"), "patch"),
        "mm_use_im_patch_token": (spec.use_im_patch_token, earlier.get("use_im_patch_token"), False),
        "image_size": (spec.image_size, loaded.processor.image_size[0], None),
    }
    for name, (given, kept, default) in decided.items():
        if kept is not None and given not in (default, kept):
            logger.warning("%s %s is ignored: %s was built with %s", flag(name), given, spec.path, kept)


@contextmanager
def whole_weights(config: Any) -> Iterator[None]:
    """Context in which every rank builds the whole model; ZeRO-3 shards it when the trainer starts.

    Args:
        config: transformers' DeepSpeed configuration; None without DeepSpeed.
    """
    # New embeddings are means of old ones, and new projectors depend on the seed: both need whole weights.
    if config is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def _build(spec: ModelSpec, system: str | None) -> LoadedModel:
    if spec.vision_tower is None:
        raise ConfigError(
            f"{spec.path} is not a llava checkpoint, so it is treated as a language model. Pass --vision-tower."
        )
    name, text = template_of(spec)
    return build_model(
        spec.path,
        spec.vision_tower,
        dtype=DTYPE,
        vision_tower_config=spec.vision_tower_config,
        vision_tower_checkpoint=spec.vision_tower_checkpoint,
        projector_type=spec.projector_type,
        projector_kwargs=spec.projector_kwargs,
        select_layer=spec.select_layer,
        select_feature=spec.select_feature,
        use_im_start_end=spec.use_im_start_end,
        use_im_patch_token=spec.use_im_patch_token,
        template=name or NEW_MODEL_TEMPLATE,
        chat_template=text,
        image_mode=spec.image_mode or NEW_MODEL_IMAGE_MODE,
        patch_merge_type=spec.patch_merge_type or "flat",
        image_grid_pinpoints=spec.image_grid_pinpoints,
        system=system,
        image_size=spec.image_size,
        **asdict(spec.quantization),
        seed=spec.seed,
    )
