"""Plug-ins that a checkpoint needs: recorded by name when it is written, never loaded from it.

save --record_plugins--> names in config.json --check_plugins--> an error of one line where one is not loaded
"""

from __future__ import annotations

from typing import Any

from llava.errors import CheckpointError
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.legacy_keys import PLUGINS_KEY
from llava.utils.plugins import missing_plugins, missing_text, needed_plugins

SOURCE_KEY = "llava_source"
"""Key of an exported config.json for settings that transformers' Llava does not have."""


def plugins_of(config: Any) -> list[str]:
    """Return the names of the plug-ins that added a model's projector and template."""
    return needed_plugins(projector=config.projector_type, template=config.template)


def record_plugins(config: Any) -> None:
    """Write the plug-ins that a model needs into its configuration; nothing without any."""
    config.plugins = plugins_of(config) or None


def absent_plugins(checkpoint: Checkpoint) -> list[str]:
    """Return the plug-ins that a checkpoint names and that are not loaded."""
    config = checkpoint.config
    source = config.get(SOURCE_KEY)
    inner = source.get("plugins") if isinstance(source, dict) else None
    return missing_plugins(config.get("plugins") or config.get(PLUGINS_KEY) or inner)


def absent_text(missing: list[str]) -> str:
    """Return the message about plug-ins that a checkpoint needs."""
    return f"it {missing_text(missing)} (a checkpoint loads no code)"


def check_plugins(checkpoint: Checkpoint) -> None:
    """Check that the plug-ins that a checkpoint needs are loaded.

    Raises:
        CheckpointError: one is not; the message names it.
    """
    if missing := absent_plugins(checkpoint):
        raise CheckpointError(f"{checkpoint.path}: {absent_text(missing)}")
