"""Load folders of transformers' own Llava as our models.

LlavaConfig + language_model.*, vision_tower.*, multi_modal_projector.linear_1|2 --names--> ours (mlp2x_gelu)
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaConfig

from llava.errors import CheckpointError
from llava.model.builder import LoadedModel, finish_model, portable_path
from llava.model.checkpoint.assemble import LoadOptions, grow_tables, model_from_state
from llava.model.checkpoint.files.shards import TensorReader
from llava.model.checkpoint.formats import CONFIG_FILE, Checkpoint, read_json
from llava.model.checkpoint.plugged import SOURCE_KEY
from llava.model.checkpoint.weight_names import HF_PREFIXES, PROJECTOR, is_buffer, renamed_prefix
from llava.model.config import LlavaMedConfig
from llava.model.multimodal_encoder.towers import (
    DEFAULT_PROCESSORS,
    UNREADABLE,
    first_line,
    num_extra_tokens,
    num_patches,
    tower_image_processor,
)
from llava.model.projector_types import ProjectorType, find_type
from llava.processing import LlavaMedProcessor
from llava.tokenization import read_tokenizer
from llava.utils.jsonl import read_text

logger = logging.getLogger(__name__)

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


TEMPLATE_MARKS = {
    "<<SYS>>": "llava_llama_2",
    "[INST]": "mistral_instruct",
    "<|im_start|>": "chatml_direct",
    "ASSISTANT:": "vicuna_v1",
}
"""Text in a chat template, and our template that writes the same."""

IMAGE_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
"""Settings of transformers' CLIP and Llava processors that ours supports."""


def load_hf(checkpoint: Checkpoint, options: LoadOptions) -> LoadedModel:
    """Load a folder of transformers' LlavaForConditionalGeneration.

    Raises:
        CheckpointError: it has parts that ours lacks, or weights do not fit.
    """
    config = _config(checkpoint)
    kept = dict(getattr(config, SOURCE_KEY, None) or {})
    kind = _projector_of(checkpoint, config, kept)
    state = _with_projector(_state(checkpoint), kind)
    try:
        tokenizer = read_tokenizer(checkpoint.folder)
        image_processor, mode = _image_processor(checkpoint.folder, config.vision_config)
    except UNREADABLE as error:
        raise CheckpointError(f"the processor of {checkpoint.path} cannot be loaded: {first_line(error)}") from error
    full = config.vision_feature_select_strategy == "full"
    vision: Any = config.vision_config
    patches = num_patches(image_processor, vision) + (num_extra_tokens(vision) if full else 0)
    processor = LlavaMedProcessor(
        tokenizer,
        image_processor,
        template=options.template or kept.get("template") or _template(checkpoint, config),
        image_mode=kept.get("image_mode") or mode,
        num_image_tokens=patches,
        placement=kept.get("placement") or "front",
        use_im_start_end=bool(kept.get("use_im_start_end")),
        system=kept.get("system"),
        prefix_mark=kept.get("prefix_mark"),
        add_bos=kept.get("add_bos"),
        dicom=kept.get("dicom"),
        fast_jpeg=bool(kept.get("fast_jpeg")),
    )
    grow_tables(state, len(tokenizer), checkpoint.tensors)
    model = model_from_state(_ours(config, processor, kept, kind.name), state, options, name=str(checkpoint.path))
    return finish_model(model, processor, {"base": portable_path(str(checkpoint.folder)), "load": options.parts})


def _config(checkpoint: Checkpoint) -> LlavaConfig:
    content = read_json(checkpoint.folder / CONFIG_FILE)
    if content.get("model_type") != "llava":
        raise CheckpointError(
            f"{checkpoint.path} is a vision-language model of type {content.get('model_type')!r}; expected 'llava'"
        )
    try:
        config = LlavaConfig.from_pretrained(checkpoint.folder)
    except UNREADABLE as error:
        raise CheckpointError(f"{checkpoint.path}/{CONFIG_FILE}: {first_line(error)}") from error
    return config


def _projector_of(checkpoint: Checkpoint, config: LlavaConfig, kept: dict[str, Any]) -> ProjectorType:
    """Return the type of the projector: the recorded one of a plug-in, or else by its activation.

    Raises:
        CheckpointError: there is none with this activation, or the layers have no bias.
    """
    act = config.projector_hidden_act
    for name in (str(kept.get("projector")), "linear", "mlp2x_gelu"):
        kind = find_type(name)
        if (
            config.multimodal_projector_bias
            and kind is not None
            and kind.transformers is not None
            and kind.transformers.activation == act
        ):
            return kind
    raise CheckpointError(
        f"{checkpoint.path} has a projector with {act}, bias {config.multimodal_projector_bias}; expected two layers "
        "with bias, and GELU or nothing between them"
    )


def _with_projector(state: dict[str, Tensor], kind: ProjectorType) -> dict[str, Tensor]:
    """Return the weights with the projector's layers `0.` and `2.` under the names of its type."""
    form = kind.transformers
    assert form is not None
    if form.second is None:
        _merge_linear(state)
    names = {PROJECTOR + ("0." if form.second is not None else ""): PROJECTOR + form.first}
    names |= {PROJECTOR + "2.": PROJECTOR + form.second} if form.second is not None else {}
    return {renamed_prefix(name, names) or name: tensor for name, tensor in state.items()}


def _merge_linear(state: dict[str, Tensor]) -> None:
    """Replace two linear layers without activation by their product, which is exact for an identity."""
    first, second = (state.pop(f"{PROJECTOR}{number}.weight") for number in (0, 2))
    bias, last = (state.pop(f"{PROJECTOR}{number}.bias") for number in (0, 2))
    merged = {"weight": second.float() @ first.float(), "bias": second.float() @ bias.float() + last.float()}
    state |= {PROJECTOR + name: tensor.to(first.dtype) for name, tensor in merged.items()}


def _state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in TensorReader(checkpoint.tensors):
        if is_buffer(name):
            continue
        ours = renamed_prefix(name, HF_PREFIXES)
        if ours is None:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} belongs to no part of the model")
        state[ours] = tensor
    return state


def _image_processor(folder: Path, vision: Any) -> tuple[Any, str]:
    """Return the image processor in CLIP's PIL form, and the image mode.

    transformers' processor for Llava pads as we do, so its padding becomes our image mode.

    Raises:
        CheckpointError: images would become inputs of several sizes.
    """
    content: dict[str, Any] = {}
    for name in IMAGE_FILES:
        found = read_json(folder / name)
        content = content or found.get("image_processor") or (found if "image_mean" in found else {})
    if not content:
        return tower_image_processor(str(folder), vision, None), "square"
    if str(content.get("image_processor_type", "")).startswith(("CLIP", "Llava")):
        pads = bool(content.get("do_pad"))
        if not (content.get("do_resize", True) or content.get("do_center_crop", True)):
            raise CheckpointError(
                f"{folder}: do_resize and do_center_crop are both false, so images keep their sizes; the tower takes "
                "one size, so expected at least one of them"
            )
        settings = {key: content[key] for key in IMAGE_SETTINGS if content.get(key) is not None}
        return CLIPImageProcessorPil(**settings), "pad" if pads else "square"
    kind, _ = DEFAULT_PROCESSORS.get(vision.model_type, DEFAULT_PROCESSORS["vit"])
    return kind(**{key: value for key, value in content.items() if key != "image_processor_type"}), "square"


def _template(checkpoint: Checkpoint, config: LlavaConfig) -> str:
    """Return the template by marks in the folder's chat template; without any, guess and warn."""
    text = ""
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"):
        file = checkpoint.folder / name
        text += read_text(file) if file.is_file() else ""
    for mark, template in TEMPLATE_MARKS.items():
        if mark in text:
            return template
    is_mistral = cast(Any, config.text_config).model_type == "mistral"
    guess = "mistral_instruct" if is_mistral else "vicuna_v1"
    logger.warning(
        "%s has an unknown chat template; using template %s. To use another one, pass --template",
        checkpoint.path,
        guess,
    )
    return guess


def _ours(config: LlavaConfig, processor: LlavaMedProcessor, kept: dict[str, Any], projector: str) -> LlavaMedConfig:
    markers = [word for word in processor.marker_ids if word is not None]
    # Through JSON, because transformers' configuration objects must not be shared between models.
    text, vision = (json.loads(part.to_json_string(use_diff=False)) for part in _parts(config))
    return LlavaMedConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=config.image_token_index,
        image_seq_length=processor.num_image_tokens,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_feature_layer=config.vision_feature_layer,
        projector_type=projector,
        use_im_start_end=processor.use_im_start_end,
        marker_token_ids=markers if processor.use_im_start_end else None,
        image_aspect_ratio=processor.image_mode,
        template=processor.template.name,
        placement=processor.placement,
        tie_word_embeddings=config.tie_word_embeddings,
        source=kept.get("source"),
    )


def _parts(config: LlavaConfig) -> tuple[Any, Any]:
    return config.text_config, config.vision_config
