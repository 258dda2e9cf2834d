"""Tokenizer, template and processor of a legacy checkpoint, by what it holds (specification llava-med 1.2, 2.4)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig

from llava.errors import CheckpointError
from llava.model.checkpoint.formats import PAD_TOKEN, Layout
from llava.model.checkpoint.legacy.config import image_mode
from llava.model.checkpoint.legacy_keys import merge_type
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line
from llava.processing import LlavaMedProcessor
from llava.tokenization import word_id

logger = logging.getLogger(__name__)

EMPTY_TOKENS = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
"""Early conversions of LLaMA left these empty."""


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder, with special tokens repaired where the folder has them empty.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        # Given a configuration, transformers does not read the folder's own, whose type it does not know. It is Llama's
        # for Mistral too: these checkpoints hold Llama tokenizers, and transformers 5 makes another one of Mistral's.
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, config=LlamaConfig())
    except UNREADABLE as error:
        raise CheckpointError(f"{folder} holds no usable tokenizer: {first_line(error)}") from error
    for name, token in EMPTY_TOKENS.items():
        if not getattr(tokenizer, name, None) and word_id(tokenizer, token) is not None:
            setattr(tokenizer, name, token)
            logger.info("%s: %s was empty, set to %s", folder, name, token)
    return tokenizer


def add_tokens(tokenizer: Any, layout: Layout) -> None:
    """Give the vocabulary the words that this checkpoint's style needs."""
    # Also those that are known: as plain words, which old files make of them, they would be spelled out inside a text.
    tokenizer.add_tokens(layout.needed_words, special_tokens=True)


def make_processor(
    layout: Layout, tokenizer: Any, image_processor: Any, num_image_tokens: int, template: str | None
) -> LlavaMedProcessor:
    """The processor that feeds the model as its trainer did."""
    is_old = layout.style == "patch_token"
    return LlavaMedProcessor(
        tokenizer,
        image_processor,
        template=template or layout.template([word for word in [PAD_TOKEN] if word_id(tokenizer, word) is not None]),
        image_mode=image_mode(layout.config),
        patch_merge_type=merge_type(layout.config),
        image_grid_pinpoints=layout.config.get("image_grid_pinpoints"),
        num_image_tokens=num_image_tokens,
        placement="as_written" if is_old else "front",
        use_im_start_end=bool(layout.config.get("mm_use_im_start_end")),
        strip_around_images=is_old,
    )
