"""Names of the published `llava.mm_utils`, for snippets that import them; looked up at first use."""

from __future__ import annotations

import importlib
from typing import Any

TARGET = "llava.generation.published"

NAMES = (
    "KeywordsStoppingCriteria",
    "get_model_name_from_path",
    "open_image_with_retry",
    "process_images",
    "tokenizer_image_token",
)


def __getattr__(name: str) -> Any:
    """Return a published function or class.

    Raises:
        AttributeError: the name is unknown.
    """
    if name in NAMES:
        return getattr(importlib.import_module(TARGET), name)
    raise AttributeError(f"module 'llava.mm_utils' has no attribute {name!r}; it has {', '.join(NAMES)}")
