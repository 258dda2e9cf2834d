"""Check that a processor fits its model: size and values of images, number and id of image tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from PIL import Image

from llava.errors import WRONG_SETTINGS, CheckpointError
from llava.imaging.anyres import KEEP
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.towers import num_extra_tokens, square_side
from llava.processing import LlavaMedProcessor
from llava.utils.faults import start_of

MAX_IMAGE_TOKENS = 1 << 16
"""Largest number of tokens of one image or tile; 256 patches per side."""


def check_processor(model: LlavaMedForConditionalGeneration, processor: LlavaMedProcessor, name: str) -> None:
    """Check that a model can read what its processor prepares; one image is prepared for it.

    Args:
        model: the model.
        processor: its processor.
        name: name of the checkpoint, for messages.

    Raises:
        CheckpointError: it cannot; says which file is at fault.
    """
    if model.config.image_token_id != processor.image_token_id:
        raise CheckpointError(
            f"{name}: config.json names {model.config.image_token_id} as the id of an image, but the tokenizer has "
            f"{processor.image_token_id}; use both files of one checkpoint"
        )
    _check_layers(model, name)
    if processor.image_processor is None:
        return
    if processor.image_mode != KEEP:
        _check_num_tokens(model, processor, name)
    height, width = (64, 64) if processor.image_mode == KEEP else processor.image_size  # `keep` bounds no input size
    try:
        pixels = processor.preprocess(Image.new("RGB", (2 * width, height)))
    except WRONG_SETTINGS as error:
        raise CheckpointError(f"{name}: preprocessor_config.json cannot be used: {start_of(error)}") from error
    if processor.image_mode != KEEP and tuple(pixels.shape[-2:]) != (height, width):
        raise CheckpointError(
            f"{name}: preprocessor_config.json keeps the shapes of images; expected all of {width} x {height} pixels, "
            "with do_center_crop or with height and width in size"
        )
    if not bool(torch.isfinite(pixels).all()):
        raise CheckpointError(f"{name}: preprocessor_config.json gives pixels that are not finite; is image_std 0?")


def _check_layers(model: LlavaMedForConditionalGeneration, name: str) -> None:
    layers, num_layers = model.config.vision_feature_layer, int(cast(Any, model.config.vision_config).num_hidden_layers)
    if layers == []:
        raise CheckpointError(f"{name}: config.json selects no layer of the tower; expected at least one")
    for layer in layers if isinstance(layers, list) else [layers]:
        if not -num_layers - 1 <= layer <= num_layers:
            raise CheckpointError(
                f"{name}: config.json selects layer {layer} of a tower with {num_layers}; expected "
                f"{-num_layers - 1} to {num_layers}"
            )


def _check_num_tokens(model: LlavaMedForConditionalGeneration, processor: LlavaMedProcessor, name: str) -> None:
    vision: Any = model.config.vision_config
    height, width = processor.image_size
    full = model.config.vision_feature_select_strategy == "full"
    patch = square_side(vision.patch_size)
    made = (height // patch) * (width // patch) + (num_extra_tokens(vision) if full else 0)
    if min(height, width) < patch or made > MAX_IMAGE_TOKENS or made != processor.num_image_tokens:
        raise CheckpointError(
            f"{name}: preprocessor_config.json makes images of {width} x {height} pixels, so {made} tokens with the "
            f"tower's patches of {patch} pixels; expected {processor.num_image_tokens} tokens, at most "
            f"{MAX_IMAGE_TOKENS}; correct the sizes"
        )
