"""Constants shared by several packages."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Label of a token that is not supervised."""

IMAGE_TOKEN = "<image>"
"""Placeholder of one image in text; it is replaced by one token per image patch before the model."""

IM_PATCH_TOKEN = "<im_patch>"
IM_START_TOKEN = "<im_start>"
IM_END_TOKEN = "<im_end>"
"""Tokens that `mm_use_im_patch_token` (the first) and `mm_use_im_start_end` add to a vocabulary."""

TREE_ATTENTION = "llava_tree"
"""Name of the tree attention in transformers' `AttentionInterface`."""

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the torch data types that weights can be loaded in."""

PROCESSOR_FILE = "llava_processor.json"
"""File in a checkpoint with the settings of `llava.processing`: template, image mode and others."""
