"""Names and numbers that several parts must agree on (`docs/architecture.md`, the flat batch)."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Label of a token that is not trained."""

IMAGE_TOKEN = "<image>"
"""Place holder of one image in text; expanded to one token per image patch before the model sees it."""

IM_PATCH_TOKEN = "<im_patch>"
IM_START_TOKEN = "<im_start>"
IM_END_TOKEN = "<im_end>"
"""Added tokens of checkpoints with `mm_use_im_start_end` / `mm_use_im_patch_token`."""

TREE_ATTENTION = "llava_tree"
"""Name under which the tree attention is registered with transformers' `AttentionInterface`."""

DTYPES = ("float32", "bfloat16", "float16")
"""Names in torch of the precisions that weights can be loaded in."""

PROCESSOR_FILE = "llava_processor.json"
"""Beside the weights: template, image mode and all that must not be chosen twice; see `llava.processing`."""
