"""Load checkpoints of the legacy formats: their weights under our names, around transformers' classes.

    Checkpoint --weights, base, tower--> state under our names --configuration--> model    (+ tokenizer --> processor)

Nothing is loaded partially: a missing or unknown weight is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import LlamaConfig

from llava.errors import CheckpointError
from llava.model.anyres import write_policy
from llava.model.builder import LoadedModel, finish_model, portable_path
from llava.model.checkpoint.assemble import LoadOptions, grow_tables, marker_rows, model_from_state, take_rows
from llava.model.checkpoint.files.shards import TensorReader
from llava.model.checkpoint.formats import EXTRA_FILE, PAD_TOKEN, Checkpoint
from llava.model.checkpoint.legacy.checks import SELECT_STRATEGIES, layer_refusals
from llava.model.checkpoint.legacy.config import (
    check_supported,
    image_mode,
    projector_settings,
    select_feature,
    select_layer,
    text_config,
)
from llava.model.checkpoint.legacy.lora_files import attach_adapters, merged_weights
from llava.model.checkpoint.legacy.parts import LegacyParts, open_parts
from llava.model.checkpoint.legacy_keys import merge_type, unknown_keys
from llava.model.checkpoint.vision_tower import TowerSource, find_tower
from llava.model.checkpoint.weight_names import (
    BUFFERS,
    EMBEDDINGS,
    LEGACY_PREFIXES,
    NEWLINE,
    PROJECTOR,
    TIMM_TOWER,
    TOWER,
    is_buffer,
    projector_suffix,
    renamed_prefix,
)
from llava.model.config import LlavaMedConfig
from llava.model.multimodal_encoder.open_clip_encoder.trunks import to_transformers
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line, num_extra_tokens, num_patches
from llava.processing import LlavaMedProcessor
from llava.tokenization import read_tokenizer, token_id

EMPTY_TOKENS = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
"""Special tokens that early conversions of LLaMA left empty."""


def load_tokenizer(folder: Path) -> Any:
    """Load the fast tokenizer of a folder, and restore special tokens that the folder leaves empty.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        # With a configuration, transformers does not read the folder's own, whose type it does not know. It is Llama's
        # for Mistral too: these checkpoints hold Llama tokenizers, which transformers 5 would convert for Mistral.
        tokenizer: Any = read_tokenizer(folder, config=LlamaConfig())
    except UNREADABLE as error:
        raise CheckpointError(f"{folder} holds no usable tokenizer: {first_line(error)}") from error
    for name, token in EMPTY_TOKENS.items():
        if not getattr(tokenizer, name, None) and token_id(tokenizer, token) is not None:
            setattr(tokenizer, name, token)
            logger.info("%s: %s was empty, set to %s", folder, name, token)
    return tokenizer


def add_tokens(tokenizer: Any, checkpoint: Checkpoint) -> None:
    """Add the tokens that this checkpoint's style needs to the vocabulary."""
    # Known tokens too: old files have them as plain text, and the tokenizer would split them.
    tokenizer.add_tokens(checkpoint.needed_tokens, special_tokens=True)


def make_processor(
    checkpoint: Checkpoint, tokenizer: Any, image_processor: Any, num_image_tokens: int, template: str | None
) -> LlavaMedProcessor:
    """Return the processor that prepares inputs as the checkpoint's trainer did."""
    is_old = checkpoint.style == "patch_token"
    return LlavaMedProcessor(
        tokenizer,
        image_processor,
        template=template
        or checkpoint.template([word for word in [PAD_TOKEN] if token_id(tokenizer, word) is not None]),
        image_mode=image_mode(checkpoint.config),
        patch_merge_type=merge_type(checkpoint.config),
        image_grid_pinpoints=checkpoint.config.get("image_grid_pinpoints"),
        num_image_tokens=num_image_tokens,
        placement="as_written" if is_old else "front",
        use_im_start_end=bool(checkpoint.config.get("mm_use_im_start_end")),
        strip_around_images=is_old,
    )


logger = logging.getLogger(__name__)


@dataclass(slots=True)
class GatheredWeights:
    """Weights under our names, and their origin."""

    state: dict[str, Tensor]
    tower: TowerSource
    vision_config: Any
    buffers: dict[str, str]
    num_rows: int


def load_legacy(checkpoint: Checkpoint, options: LoadOptions, parts: LegacyParts | None = None) -> LoadedModel:
    """Load a checkpoint of a legacy format.

    Args:
        checkpoint: the checkpoint.
        options: parts that were given.
        parts: see `open_parts`; None opens them.

    Raises:
        CheckpointError: a part is missing (names the flag that gives it), or weights do not fit.
    """
    parts = open_parts(checkpoint, options) if parts is None else parts
    checkpoint, base = parts.checkpoint, parts.base
    check_supported(checkpoint)
    text = text_config(checkpoint)
    if unknown := unknown_keys(checkpoint.config):
        logger.info("%s: unknown keys of config.json, kept: %s", checkpoint.path, ", ".join(unknown))
    tokenizer = load_tokenizer(tokenizer_folder(checkpoint, base))
    add_tokens(tokenizer, checkpoint)
    gathered = gather_weights(checkpoint, base, options, marker_rows(tokenizer))
    image_processor = gathered.tower.image_processor(gathered.vision_config, checkpoint.folder)
    num_image_tokens = num_patches(image_processor, gathered.vision_config)
    if select_feature(checkpoint) == "cls_patch":
        num_image_tokens += num_extra_tokens(gathered.vision_config)
    processor = make_processor(checkpoint, tokenizer, image_processor, num_image_tokens, options.template)
    grow_tables(gathered.state, len(tokenizer), checkpoint.tensors if checkpoint.kind == "legacy" else None)
    config = make_config(checkpoint, text, gathered, processor)
    write_policy(config, processor.image_grid)
    config.source = {**source_of(checkpoint, gathered), "config": parts.written}
    merge = options.merge and options.quantization.bits == 16
    if merge and parts.adapters:
        gathered.state.update(merged_weights(gathered.state, parts.adapters))
    model = model_from_state(config, gathered.state, options, name=str(checkpoint.path))
    loaded = finish_model(model, processor, {"base": portable_path(str(checkpoint.folder)), "load": options.parts})
    loaded.context_len = int(checkpoint.config.get("max_sequence_length") or loaded.context_len)
    if parts.adapters and not merge:
        loaded.model = cast(Any, attach_adapters(model, parts.adapters))
    return loaded


def tokenizer_folder(checkpoint: Checkpoint, base: Checkpoint | None) -> Path:
    """Return the folder whose tokenizer a checkpoint uses: its own, else its base's.

    Raises:
        CheckpointError: neither has one.
    """
    for part in (checkpoint, base):
        if part is not None and part.has_tokenizer:
            return part.folder
    raise CheckpointError(f"{checkpoint.path} has no tokenizer; pass the model it was trained from with --model-base")


def gather_weights(
    checkpoint: Checkpoint, base: Checkpoint | None, options: LoadOptions, markers: Sequence[int]
) -> GatheredWeights:
    """Collect all weights under our names, memory-mapped from the files, without adapters.

    Args:
        checkpoint: the checkpoint.
        base: what it builds on.
        options: parts that were given.
        markers: see `marker_rows`.

    Raises:
        CheckpointError: a part is missing, or a tensor belongs to no part.
    """
    state: dict[str, Tensor] = {}
    buffers: dict[str, str] = {}
    if checkpoint.kind != "legacy" and base is not None:
        _take(state, buffers, base)
    if checkpoint.kind == "legacy":
        _take(state, buffers, checkpoint)
    elif checkpoint.kind == "legacy_adapter":
        if not checkpoint.extra:
            raise CheckpointError(f"{checkpoint.path} has no {EXTRA_FILE}, which holds its projector")
        _take_projector(state, TensorReader(checkpoint.extra), checkpoint, markers)
    else:
        _take_projector(state, TensorReader(checkpoint.tensors), checkpoint, markers)
    if EMBEDDINGS not in state:
        raise CheckpointError(f"{checkpoint.path} has no language model; expected model.embed_tokens.weight")
    tower, vision_config = _take_tower(state, checkpoint, options)
    return GatheredWeights(state, tower, vision_config, buffers, state[EMBEDDINGS].shape[0])


def _take(state: dict[str, Tensor], buffers: dict[str, str], checkpoint: Checkpoint) -> None:
    """Add the weights of a legacy checkpoint or a plain language model, under our names."""
    trunk: dict[str, Tensor] = {}
    for name, tensor in TensorReader(checkpoint.tensors):
        if is_buffer(name):
            kind = next(kind for kind, pattern in BUFFERS.items() if pattern.fullmatch(name))
            buffers[kind] = str(tensor.dtype).removeprefix("torch.")
            continue
        ours = renamed_prefix(name, LEGACY_PREFIXES)
        if ours is None:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} belongs to no part of the model; see `llava checkpoint inspect`"
            )
        (trunk if name.startswith(TIMM_TOWER) else state)[ours] = tensor
    if trunk:
        state.update(timm_tower(trunk))


def timm_tower(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a tower that is stored under timm's names (LLaVA-Rad) under those of transformers' class.

    Args:
        trunk: its weights, by our prefix and timm's names.

    Returns:
        The weights under our names; queries, keys and values split, and zeros for a pooler, which is unused.
    """
    plain = {name.removeprefix(TOWER): tensor for name, tensor in trunk.items()}
    num_layers = 1 + max(int(name.split(".")[1]) for name in plain if name.startswith("blocks."))
    kind = "dinov2" if any(".ls1." in name for name in plain) else "vit"
    state = {TOWER + name: tensor for name, tensor in to_transformers(plain, kind, num_layers).items()}
    if kind == "vit":
        width = plain["cls_token"].shape[-1]
        state[TOWER + "pooler.dense.weight"] = plain["cls_token"].new_zeros(width, width)
        state[TOWER + "pooler.dense.bias"] = plain["cls_token"].new_zeros(width)
    return state


def _take_projector(
    state: dict[str, Tensor], reader: TensorReader, checkpoint: Checkpoint, markers: Sequence[int]
) -> None:
    """Add the projector's weights of a file, and embedding rows trained with them, see `take_rows`."""
    for name in [name for name in state if name.startswith(PROJECTOR)]:
        del state[name]
    for name, tensor in reader:
        suffix = projector_suffix(name)
        if suffix is not None:
            state[PROJECTOR + suffix] = tensor
        elif name.endswith("embed_tokens.weight"):
            take_rows(state, tensor, checkpoint, markers)
        elif name.endswith(NEWLINE):
            state[f"model.{NEWLINE}"] = tensor
        elif "lora_" not in name:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} belongs to neither the projector nor the embeddings"
            )


def _take_tower(state: dict[str, Tensor], checkpoint: Checkpoint, options: LoadOptions) -> tuple[TowerSource, Any]:
    """Return the tower's source and configuration; add its weights if they are not there yet."""
    is_inside = any(name.startswith(TOWER) for name in state)
    source = find_tower(
        checkpoint if is_inside == checkpoint.has_tower else replace(checkpoint, tensors={}),
        options.vision_tower,
        options.vision_tower_config,
        options.vision_tower_checkpoint,
    )
    if is_inside:
        logger.info("%s: vision tower from the checkpoint itself", checkpoint.path)
        return source, source.config()
    dtype = state[EMBEDDINGS].dtype
    tower = source.load(dtype)
    state.update({TOWER + name: tensor for name, tensor in tower.state_dict().items() if not is_buffer(name)})
    logger.info("%s: vision tower from %s", checkpoint.path, source.checkpoint or source.name)
    return source, tower.config


def make_config(checkpoint: Checkpoint, text: Any, gathered: GatheredWeights, processor: Any) -> LlavaMedConfig:
    """Return our configuration of a legacy checkpoint.

    Raises:
        CheckpointError: the tower lacks the selected layer.
    """
    kind, settings = projector_settings(checkpoint)
    layer, num_layers = select_layer(checkpoint), int(gathered.vision_config.num_hidden_layers)
    for reason in layer_refusals(layer, num_layers):  # for a tower that was found only now
        raise CheckpointError(f"{checkpoint.path}: {reason}")
    text.vocab_size = gathered.state[EMBEDDINGS].shape[0]
    markers = [word for word in processor.marker_ids if word is not None] if processor.use_im_start_end else None
    return LlavaMedConfig(
        vision_config=gathered.vision_config,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.num_image_tokens,
        vision_feature_select_strategy=cast(Any, SELECT_STRATEGIES[select_feature(checkpoint)]),
        vision_feature_layer=layer,
        projector_type=kind,
        projector_kwargs=settings,
        use_im_start_end=processor.use_im_start_end,
        marker_token_ids=markers,
        template=processor.template.name,
        placement=processor.placement,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def source_of(checkpoint: Checkpoint, gathered: GatheredWeights) -> dict[str, Any]:
    """Return what is needed to write the same format again."""
    tower = "timm" if checkpoint.has_timm_tower else "inside" if checkpoint.has_tower else "beside"
    files = [entry.file.suffix for entry in checkpoint.tensors.values()]
    return {
        "kind": checkpoint.kind,
        "style": checkpoint.style,
        "num_rows": gathered.num_rows,
        "loaded_rows": gathered.state[EMBEDDINGS].shape[0],
        "tower": tower,
        "buffers": gathered.buffers,
        "safe": ".safetensors" in files,
    }
