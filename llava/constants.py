"""Constants shared by several packages."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Label of a token that is not supervised."""

IMAGE_TOKEN_INDEX = -200
"""Id of one image in the ids of published snippets (`llava.mm_utils`); the package itself uses the placeholder's id."""

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

ARGUMENTS_FILE = "resolved_arguments.json"
"""File in the folder of a run with the value of every argument."""

GRAY = (127, 127, 127)
BLANK_SIZE = 336
"""Color and side of the blank image of controls: one gray square that shows nothing."""

SERVER_KEY_VARIABLE = "LLAVA_API_KEY"
"""Environment variable with the key of a client of servers; no option takes it, since other users can read options."""
