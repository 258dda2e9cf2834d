"""Checkpoint formats, recognized by content and never by name, without torch or transformers.

folder --config.json, adapter_config.json, headers of the weight files--> Checkpoint(kind, style, config, tensors)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from llava.constants import IM_END_TOKEN, IM_PATCH_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from llava.errors import CheckpointError
from llava.model.checkpoint.files.shards import TensorEntry, find_weights, list_tensors
from llava.model.checkpoint.legacy_keys import TEMPLATE_KEY, check_values
from llava.model.checkpoint.weight_names import (
    EMBEDDINGS,
    HF_PREFIXES,
    HF_ROOTS,
    LANGUAGE_MODEL,
    LEGACY_PREFIXES,
    LEGACY_TOWER,
    NEWLINE,
    PEFT_PREFIX,
    PROJECTOR,
    TIMM_TOWER,
    TOWER,
    TOWER_ROOT,
    projector_suffix,
    projector_type_of,
    renamed_prefix,
    without_peft,
)
from llava.model.config_sizes import check_patterns, check_sizes, json_settings

OUR_TYPE = "llava_med"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.bin")
"""The first is written; `.bin` files of other programs are read."""

EXTRA_FILE = "non_lora_trainables.bin"
ORIGIN_FILE = "llava_origin.json"
"""File in which an adapter or projector records what it builds on."""

PROVENANCE_FILE = "provenance.json"
"""Record of a training run: data, weights, code, command."""

PROJECTOR_FILE = "mm_projector.bin"
PROJECTOR_SAFE_FILE = "mm_projector.safetensors"
PROJECTOR_FILES = (PROJECTOR_SAFE_FILE, PROJECTOR_FILE)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

Kind = Literal[
    "model",
    "adapter",
    "projector",
    "legacy",
    "legacy_adapter",
    "legacy_projector",
    "hf_llava",
    "hf_adapter",
    "tower_adapter",
    "vision_tower",
    "language_model",
]
KINDS: dict[Kind, str] = {
    "model": "a whole model of this package",
    "adapter": "an adapter of this package",
    "projector": "a projector of this package",
    "legacy": "a whole model in the format of LLaVA, LLaVA-Med, LLaVA-Rad or STLLaVA-Med",
    "legacy_adapter": "a LoRA adapter in one of these formats (adapter and non_lora_trainables.bin)",
    "legacy_projector": "a projector alone in one of these formats (mm_projector.bin)",
    "hf_llava": "a model of transformers' LlavaForConditionalGeneration",
    "hf_adapter": "an adapter of transformers' Llava, as peft writes it",
    "tower_adapter": "a LoRA adapter of a vision tower (STLLaVA-Med's Vit-lora)",
    "vision_tower": "a vision tower",
    "language_model": "a plain language model",
}
OUR_KINDS: tuple[Kind, ...] = ("model", "adapter", "projector")
assert set(KINDS) == set(get_args(Kind))

Style = Literal["patch_token", "placeholder"]
"""How the prompt holds an image: a run of `<im_patch>` ids (LLaVA before 1.0, LLaVA-Med 1.0), or one placeholder that
the model replaces (all later ones)."""

PAD_TOKEN = "[PAD]"
"""Added by version-0 training where the vocabulary had no padding token."""

PLACEHOLDER_KEYS = ("mm_projector_type", "mm_vision_select_feature", "mm_use_im_patch_token", "image_aspect_ratio")
"""Configuration keys that every program of the placeholder style writes, and none of the patch-token style."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Format and content of a checkpoint.

    Attributes:
        path: the folder, or the one weight file.
        kind: key of `KINDS`.
        config: config.json, empty if it has none.
        adapter: adapter_config.json, empty if it has none.
        tensors: tensors of the main weight file (or files).
        extra: tensors of `non_lora_trainables.bin`.
        tower: a tower's LoRA adapter inside this folder.
    """

    path: Path
    kind: Kind
    config: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    extra: dict[str, TensorEntry] = field(default_factory=dict)
    tower: Checkpoint | None = None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Recognize a checkpoint folder or one weight file, and list its tensors.

        Raises:
            CheckpointError: it is in no known format, or a file is broken.
        """
        given = Path(path)
        if given.is_file():
            return _open_file(given)
        if not given.is_dir():
            raise CheckpointError(f"{path}: no such folder; expected a checkpoint folder or a weight file")
        config, adapter = _read_config(given), read_json(given / ADAPTER_CONFIG_FILE)
        if config.get("model_type") == OUR_TYPE:
            return _open_ours(given, config, adapter)
        if adapter:
            return _open_adapter(given, config, adapter)
        if find_weights(given) is not None:
            tensors = list_tensors(given)
            return cls(given, _kind_of_weights(config, tensors), config, tensors=tensors)
        if file := first_file(given, PROJECTOR_FILES):
            return cls(given, "legacy_projector", config, tensors=list_tensors(file))
        raise CheckpointError(f"{path}: {_explain(given, config)}")

    @property
    def folder(self) -> Path:
        """The folder that contains the weights."""
        return self.path.parent if self.path.is_file() else self.path

    @property
    def tower_adapter(self) -> Path | None:
        """The folder of a tower's LoRA adapter inside this one."""
        return None if self.tower is None else self.tower.path

    @property
    def style(self) -> Style:
        """How this model's prompt holds images; only for the legacy kinds."""
        suffixes = self.projector_names
        if any(key in self.config for key in PLACEHOLDER_KEYS) or (suffixes and suffixes != {"weight", "bias"}):
            return "placeholder"
        return "placeholder" if self.has_tower or "mistral" in self.text_type else "patch_token"

    @property
    def text_type(self) -> str:
        """Type of the language model, by transformers' name.

        The legacy types are `llava`, `llava_llama`, `llava_mistral`, or the plain language model's own (STLLaVA-Med).
        """
        architectures = self.config.get("architectures")
        listed = architectures if isinstance(architectures, list) else []
        words = " ".join([str(self.config.get("model_type")), *map(str, listed)])
        for text_type in ("mistral", "mpt", "qwen2", "phi", "gemma"):
            if text_type in words.lower():
                return text_type
        return "llama"

    @property
    def projector_names(self) -> set[str]:
        """The projector's own names of its weights in the files."""
        names = (projector_suffix(name) for name in (*self.tensors, *self.extra) if "lora_" not in name)
        return {name for name in names if name is not None}

    @property
    def projector_type(self) -> str | None:
        """Projector type by the weights if they are in the files, else by the configuration.

        Raises:
            CheckpointError: no known projector has these weights.
        """
        given = self.config.get("mm_projector_type")
        if names := self.projector_names:
            return projector_type_of(names, str(given))
        return str(given) if given else None

    @property
    def has_tower(self) -> bool:
        """Whether the files hold the vision tower's weights."""
        return any(name.startswith(LEGACY_TOWER) and "lora_" not in name for name in self.tensors)

    @property
    def has_timm_tower(self) -> bool:
        """Whether the files hold the tower's weights under timm's names (LLaVA-Rad)."""
        return any(name.startswith(TIMM_TOWER) for name in self.tensors)

    @property
    def uses_patch_token(self) -> bool:
        """Whether the vocabulary has `<im_patch>`: as the configuration says, and true by default."""
        return bool(self.config.get("mm_use_im_patch_token", True))

    @property
    def needed_tokens(self) -> list[str]:
        """Tokens that a legacy checkpoint's vocabulary must have, in the order its trainer added them."""
        wanted = [IM_PATCH_TOKEN] if self.uses_patch_token else []
        wanted += [IM_START_TOKEN, IM_END_TOKEN] if self.config.get("mm_use_im_start_end") else []
        return wanted + ([IMAGE_TOKEN] if self.style == "placeholder" else [])

    def template(self, words: Collection[str]) -> str:
        """Return the template that a legacy checkpoint was trained with: as named, or inferred from content.

        The patch-token style has two trainers' versions, of which one adds a padding token. A projector trained alone
        in the placeholder style saw captions without roles.

        Args:
            words: the vocabulary, or at least its added tokens.
        """
        if named := self.config.get(TEMPLATE_KEY):
            return str(named)
        if self.style == "patch_token":
            return "v0" if PAD_TOKEN in words else "vicuna_v1"
        if self.kind == "legacy_projector" and self.config.get("tune_mm_mlp_adapter"):
            return "plain"
        return "mistral_instruct" if self.text_type == "mistral" else "vicuna_v1"

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer."""
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)


def read_json(file: Path) -> dict[str, Any]:
    """Return a file's JSON object, or an empty one if the file does not exist.

    Raises:
        CheckpointError: the file is broken.
    """
    if not file.is_file():
        return {}
    try:
        content = json_settings(file)
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    if file.name == ADAPTER_CONFIG_FILE:
        check_patterns(content, file)
    return cast(dict[str, Any], content)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return config.json; sizes are checked, and the types of values that the legacy formats depend on."""
    config = read_json(folder / CONFIG_FILE)
    check_sizes(config, folder / CONFIG_FILE)
    if any(key.startswith("mm_") for key in config):
        check_values(config, folder / CONFIG_FILE)
    return config


def first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first of several files that exists in a folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _open_file(file: Path) -> Checkpoint:
    tensors, config = list_tensors(file), _read_config(file.parent)
    layers = [name for name in tensors if ".layers.0." in name and "lora_" not in name]
    if any(projector_suffix(name) for name in tensors) and not layers:
        return Checkpoint(file, "legacy_projector", config, tensors=tensors)
    return Checkpoint(file, _kind_of_weights(config, tensors), config, tensors=tensors)


def _open_ours(folder: Path, config: dict[str, Any], adapter: dict[str, Any]) -> Checkpoint:
    if adapter:
        extra = list_tensors(folder / EXTRA_FILE) if (folder / EXTRA_FILE).is_file() else {}
        return Checkpoint(folder, "adapter", config, adapter, list_tensors(_adapter_file(folder)), extra)
    if find_weights(folder) is not None:
        return Checkpoint(folder, "model", config, tensors=list_tensors(folder))
    if file := first_file(folder, PROJECTOR_FILES):
        return Checkpoint(folder, "projector", config, tensors=list_tensors(file))
    raise CheckpointError(f"{folder}: {_explain(folder, config)}")


def _adapter_file(folder: Path) -> Path:
    if file := first_file(folder, ADAPTER_FILES):
        return file
    raise CheckpointError(f"{folder} has {ADAPTER_CONFIG_FILE} but no weights; expected {' or '.join(ADAPTER_FILES)}")


def _open_adapter(folder: Path, config: dict[str, Any], adapter: dict[str, Any]) -> Checkpoint:
    tensors = list_tensors(_adapter_file(folder))
    extra = list_tensors(folder / EXTRA_FILE) if (folder / EXTRA_FILE).is_file() else {}
    if not extra and is_hf_adapter(tensors, adapter):
        return Checkpoint(folder, "hf_adapter", config, adapter, tensors)
    if _is_of_tower(tensors):
        return Checkpoint(folder, "tower_adapter", config, adapter, tensors)
    return Checkpoint(folder, "legacy_adapter", config, adapter, tensors, extra, _inner_tower_adapter(folder))


def is_hf_adapter(names: Collection[str], adapter: Mapping[str, Any]) -> bool:
    """Return whether an adapter's tensors have the names of transformers' Llava, by any of its versions.

    Args:
        names: names in the file.
        adapter: adapter_config.json, which may name the class of the base.
    """
    bare = [name.removeprefix(PEFT_PREFIX).removeprefix("model.") for name in names]
    if any(name.startswith(HF_ROOTS) for name in bare):
        return True
    if not bare or not all(name.startswith("vision_tower.") for name in bare):
        return False
    # Legacy adapters of a tower have these names too, but not with `model.` before them.
    base_class = str((adapter.get("auto_mapping") or {}).get("base_model_class"))
    nested = any(name.startswith("vision_tower.vision_tower.") for name in bare)
    return not nested and (base_class.startswith("Llava") or all(f"{PEFT_PREFIX}model." in name for name in names))


def _is_of_tower(names: Collection[str]) -> bool:
    return bool(names) and all("vision" in name for name in names)


def _inner_tower_adapter(folder: Path) -> Checkpoint | None:
    """Return the first adapter of a vision tower in a subfolder."""
    for child in sorted(folder.iterdir()):
        if (child / ADAPTER_CONFIG_FILE).is_file():
            tensors = list_tensors(_adapter_file(child))
            if _is_of_tower(tensors):
                return Checkpoint(
                    child, "tower_adapter", _read_config(child), read_json(child / ADAPTER_CONFIG_FILE), tensors
                )
    return None


def _kind_of_weights(config: dict[str, Any], tensors: dict[str, TensorEntry]) -> Kind:
    if any("multi_modal_projector." in name for name in tensors) or "text_config" in config:
        return "hf_llava"
    if any(projector_suffix(name) for name in tensors) or "mm_vision_tower" in config:
        return "legacy"
    names = set(tensors)
    if any("embed_tokens" in name or name.startswith(("transformer.", "gpt_neox.")) for name in names):
        return "language_model"
    if "vision" in str(config.get("model_type")) or any(
        "patch_embed" in name or name.startswith("visual.") for name in names
    ):
        return "vision_tower"
    return "language_model"


def _explain(folder: Path, config: dict[str, Any]) -> str:
    """Return why a folder is in no known format."""
    found = ", ".join(sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))[:8]) or "nothing"
    if not config:
        return f"no {CONFIG_FILE} that names a model type; found {found}"
    return f"{CONFIG_FILE} without weights (model, adapter or {PROJECTOR_FILES[-1]}); found {found}"


TABLE = "embed_tokens.weight"


def our_name(checkpoint: Checkpoint, name: str) -> str | None:
    """Return our name of a tensor (in an adapter, with peft's prefix), or None if it belongs to no part."""
    if checkpoint.kind in ("model", "vision_tower"):
        return name
    if checkpoint.kind in ("hf_llava", "hf_adapter"):
        ours = renamed_prefix(name.removeprefix(PEFT_PREFIX), HF_PREFIXES)
        return PEFT_PREFIX + ours if ours and checkpoint.kind == "hf_adapter" else ours
    if "lora_" in name:
        return _in_adapter(checkpoint, name)
    if suffix := projector_suffix(name):
        return PROJECTOR + suffix
    if checkpoint.kind in OUR_KINDS:
        return EMBEDDINGS if name == f"model.{TABLE}" else name.removeprefix(PEFT_PREFIX)
    return _in_legacy(checkpoint, name)


def _in_adapter(checkpoint: Checkpoint, name: str) -> str | None:
    """Return our name of one matrix of an adapter, of the language model's or of a tower's own."""
    if checkpoint.kind == "adapter" or name.startswith(PEFT_PREFIX + LANGUAGE_MODEL):
        return name
    if name.startswith(TOWER_ROOT):
        return PEFT_PREFIX + TOWER + name.removeprefix(TOWER_ROOT)
    legacy = renamed_prefix(without_peft(name), LEGACY_PREFIXES)
    return None if legacy is None else PEFT_PREFIX + legacy


def _in_legacy(checkpoint: Checkpoint, name: str) -> str | None:
    if checkpoint.kind == "legacy_projector":
        if name.endswith(TABLE):
            return EMBEDDINGS
        return f"model.{NEWLINE}" if name.endswith(NEWLINE) else None
    legacy = renamed_prefix(without_peft(name), LEGACY_PREFIXES)
    return f"{legacy} (as transformers' class splits it)" if name.startswith(TIMM_TOWER) else legacy
