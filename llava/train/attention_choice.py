"""Choices of `--attn-implementation`, checked before a model is loaded. No import of torch."""

from __future__ import annotations

from importlib.util import find_spec

from llava.errors import ConfigError, MissingDependency

TREE = "tree"
FLASH = "flash_attention_2"
IMPLEMENTATIONS = (TREE, "sdpa", "eager", FLASH)
"""Attention of the language model in training: `tree` computes rows that share prefixes, the others are transformers'
own and compute every sequence in a padded row."""


def check_attention(name: str) -> None:
    """Check the name of an implementation, and that its package is installed.

    Raises:
        ConfigError: the name is unknown.
        MissingDependency: the package flash-attn is not installed.
    """
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"--attn-implementation {name}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if name == FLASH and find_spec("flash_attn") is None:
        raise MissingDependency(
            f"--attn-implementation {FLASH} needs the package flash-attn, which is not installed; install it with "
            "pip install 'llava[flash]', or omit the option: the default computes shared prefixes once"
        )
