"""Bounds of sizes and patterns in the files of a checkpoint, checked before a library follows them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from llava.errors import CheckpointError
from llava.utils.file_kinds import utf8_text

MAX_JSON_BYTES = 1 << 26
"""Largest size of a JSON file of a checkpoint; real ones have at most a few megabytes."""

SIZES: dict[str, int] = {
    **{name: 10_000 for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")},
    **{name: 1_000_000 for name in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "image_size",
        "patch_size", "num_channels", "projection_dim", "mm_hidden_size", "n_embd", "n_head", "d_model", "d_ff",
        "num_experts", "num_local_experts", "image_seq_length",
    )},
    **{name: 100_000_000 for name in ("vocab_size", "max_position_embeddings", "n_positions")},
}  # fmt: skip
"""Largest value of sizes in any config.json: memory and loops follow them before weights are read."""

MAY_BE_ZERO = ("head_dim", "projection_dim", "vocab_size")
"""Sizes for which some models state 0 when they have none."""

NUMBERS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "rope_theta", "initializer_range",
           "attention_dropout", "factor", "partial_rotary_factor", "router_aux_loss_coef")  # fmt: skip
TEXTS = ("model_type", "template", "projector_type")
LISTS = ("plugins", "llava_plugins")
CHANCES = ("dropout", "pdrop", "layerdrop")
"""Last words of the names of probabilities."""

TABLES = ("text_config", "vision_config", "rope_parameters", "rope_scaling")
MAX_DEPTH = 100

NAME_LENGTH = 100
"""Characters of the name of a layer, about."""

MAX_STEPS = 10
"""Repeats with more lengths are open; choices are repeated at most as often."""

MAX_WAYS = 10**7
"""Largest number of ways to match a name; Python's engine tries this many in less than a second."""


def check_sizes(config: Mapping[str, Any], file: Path, *, place: str = "", depth: int = 0) -> None:
    """Check that the sizes in any config.json, also in its parts, are whole numbers that a model can have.

    Raises:
        CheckpointError: a size is negative, zero, too large or no number, or a part is no object; names the key.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{file}: nested more than {MAX_DEPTH} levels deep; expected settings of a model")
    for key, value in config.items():
        name = f"{place}{key}"
        if value is not None and (problem := _text_problem(key, value)):
            raise CheckpointError(f"{file}: {name} is {str(value)[:60]!r}; expected {problem}")
        for part in value if isinstance(value, list) else [value]:
            if problem := _size_problem(key, part):
                raise CheckpointError(f"{file}: {name} is {str(part)[:60]!r}; expected {problem}")
            if isinstance(part, dict):
                check_sizes(part, file, place=f"{name}.", depth=depth + 1)


def _text_problem(key: str, value: Any) -> str | None:
    """Return the expected value of a name or of a list of names; None if it is valid or something else."""
    if key in TEXTS and not isinstance(value, str):
        return "a text"
    is_list = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return "a list of texts" if key in LISTS and not is_list else None


def _size_problem(key: str, value: Any) -> str | None:
    """Return the expected value of a size or number; None if it is valid or checked elsewhere."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in TABLES:
        return None if value is None or isinstance(value, dict) else "an object"
    if str(key).endswith(CHANCES) and is_number and not 0 <= value <= 1:
        return "a number from 0 to 1"
    if value is None or isinstance(value, dict) or (key not in SIZES and key not in NUMBERS):
        return None
    if key in NUMBERS:
        return None if is_number and math.isfinite(value) else "a finite number"
    least = 0 if key in MAY_BE_ZERO else 1
    is_size = is_number and least <= value <= SIZES[key] and value == int(value)
    return None if is_size else f"a whole number from {least} to {SIZES[key]}"


def check_patterns(adapter: Mapping[str, Any], file: Path) -> None:
    """Check that the patterns of an adapter, which are matched with names of layers, end in little time.

    Raises:
        CheckpointError: one is no regular expression, or could take long; names the key.
    """
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern",
                "alpha_pattern"):  # fmt: skip
        value = adapter.get(key)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []:
            if not isinstance(pattern, str):
                continue
            try:
                # peft matches a text as it is, and each part of a list or a table with the end of a name.
                _freedom(_parser.parse(pattern if pattern is value else rf"(.*\.)?({pattern})$"))
            except (re.error, ValueError, RecursionError, OverflowError) as error:
                reason = str(error) or type(error).__name__
                raise CheckpointError(f"{file}: {key} has the pattern {pattern[:60]!r}: {reason}") from error


def _freedom(tree: Any) -> tuple[int, int]:
    """Return the open repeats on a way through a parsed pattern, and the ways of all other choices.

    Raises:
        ValueError: there are more than `MAX_WAYS` ways to match a name of `NAME_LENGTH` characters.
    """
    repeats, ways = 0, 1
    for op, value in tree:
        name = str(op)
        if name.endswith("_REPEAT"):
            low, high, body = value
            lengths = high - low + 1
            inner, inner_ways = _freedom(body)
            if high > 1 and (inner or (inner_ways > 1 and high > MAX_STEPS)):
                raise ValueError("a repeat of repeats or of choices could take long; expected repeats of characters")
            repeats += inner + (lengths > MAX_STEPS)
            ways *= inner_ways ** int(high) * (lengths if lengths <= MAX_STEPS else 1)
        elif name in ("BRANCH", "GROUPREF_EXISTS"):
            branches = value[1] if name == "BRANCH" else [part or [] for part in value[1:]]
            found = [_freedom(branch) for branch in branches]
            repeats += max(inner for inner, _ in found)
            ways *= _num_texts(branches) or sum(inner_ways for _, inner_ways in found)
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
            inner, inner_ways = _freedom(value if name == "ATOMIC_GROUP" else value[-1])
            repeats, ways = repeats + inner, ways * inner_ways
        if math.comb(NAME_LENGTH + repeats, repeats) * ways > MAX_WAYS:
            raise ValueError("it could take long; use fewer repeats, optional parts and alternatives")
    return repeats, ways


def _num_texts(branches: Sequence[Any]) -> int | None:
    """Return how many alternatives can match at one position, if all are texts without patterns."""
    # One, unless one begins another.
    if not all(str(op) == "LITERAL" and value < 128 for branch in branches for op, value in branch):
        return None
    texts = sorted("".join(chr(value).lower() for _, value in branch) for branch in branches)
    return 1 + sum(second.startswith(first) for first, second in pairwise(texts))


def json_settings(file: Path) -> Any:
    """Return the content of a JSON file of a checkpoint.

    Raises:
        OSError, ValueError, RecursionError: the file cannot be read, is too large, or is not JSON in UTF-8.
    """
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes")
    return json.loads(utf8_text(file.read_bytes(), takes_mark=False))


def auto_config(path: str) -> Any:
    """Return the configuration of a part, after a check of its sizes where the path is a folder.

    Raises:
        CheckpointError: a size is out of bounds.
        Exception: transformers cannot read the configuration; any of `UNREADABLE` in `multimodal_encoder.towers`.
    """
    from transformers import AutoConfig

    file = Path(path) / "config.json"
    if file.is_file() and isinstance(content := json_settings(file), dict):
        check_sizes(content, file)
    return AutoConfig.from_pretrained(path)
