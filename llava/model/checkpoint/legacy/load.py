"""Load checkpoints of the legacy formats: their weights under our names, around transformers' classes.

    Layout --weights, base, tower--> state under our names --configuration--> model        (+ tokenizer --> processor)

Nothing is loaded partially: a missing or unknown weight is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from llava.errors import CheckpointError
from llava.model.anyres import write_policy
from llava.model.builder import Loaded, finish, portable
from llava.model.checkpoint.assemble import ForeignOptions, grow, marker_rows, place, take_rows
from llava.model.checkpoint.files.shards import TensorReader, open_tensors
from llava.model.checkpoint.formats import EXTRA_FILE, KINDS, PAD_TOKEN, Layout, sniff
from llava.model.checkpoint.hub import local_folder
from llava.model.checkpoint.legacy.checks import SELECT_STRATEGIES, layer_refusals
from llava.model.checkpoint.legacy.config import (
    check_supported,
    image_mode,
    projector_settings,
    select_feature,
    select_layer,
    text_config,
)
from llava.model.checkpoint.legacy.lora_files import LegacyLora, attach, check_copies, merged, read_lora
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
    renamed,
)
from llava.model.config import LlavaMedConfig
from llava.model.multimodal_encoder.open_clip_encoder.trunks import to_transformers
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line, num_extra_tokens, num_patches
from llava.processing import LlavaMedProcessor
from llava.tokenization import word_id

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
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, config=LlamaConfig())
    except UNREADABLE as error:
        raise CheckpointError(f"{folder} holds no usable tokenizer: {first_line(error)}") from error
    for name, token in EMPTY_TOKENS.items():
        if not getattr(tokenizer, name, None) and word_id(tokenizer, token) is not None:
            setattr(tokenizer, name, token)
            logger.info("%s: %s was empty, set to %s", folder, name, token)
    return tokenizer


def add_tokens(tokenizer: Any, layout: Layout) -> None:
    """Add the tokens that this checkpoint's style needs to the vocabulary."""
    # Known tokens too: old files have them as plain text, and the tokenizer would split them.
    tokenizer.add_tokens(layout.needed_words, special_tokens=True)


def make_processor(
    layout: Layout, tokenizer: Any, image_processor: Any, num_image_tokens: int, template: str | None
) -> LlavaMedProcessor:
    """Return the processor that prepares inputs as the checkpoint's trainer did."""
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


logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Gathered:
    """Weights under our names, and their origin."""

    state: dict[str, Tensor]
    adapters: list[LegacyLora]
    tower: TowerSource
    vision_config: Any
    buffers: dict[str, str]
    num_rows: int


def load_foreign(layout: Layout, options: ForeignOptions) -> Loaded:
    """Load a checkpoint of a legacy format.

    Raises:
        CheckpointError: a part is missing (names the flag that gives it), or weights do not fit.
    """
    written = layout.config
    layout, base = with_base(layout, options)
    check_supported(layout)
    text = text_config(layout)
    if unknown := unknown_keys(layout.config):
        logger.info("%s: unknown keys of config.json, kept: %s", layout.path, ", ".join(unknown))
    tokenizer = load_tokenizer(tokenizer_folder(layout, base))
    add_tokens(tokenizer, layout)
    gathered = gather(layout, base, options, marker_rows(tokenizer))
    image_processor = gathered.tower.image_processor(gathered.vision_config, layout.folder)
    num_image_tokens = num_patches(image_processor, gathered.vision_config)
    if select_feature(layout) == "cls_patch":
        num_image_tokens += num_extra_tokens(gathered.vision_config)
    processor = make_processor(layout, tokenizer, image_processor, num_image_tokens, options.template)
    grow(gathered.state, len(tokenizer), layout.tensors if layout.kind == "legacy" else None)
    config = make_config(layout, text, gathered, processor)
    write_policy(config, processor.image_grid)
    config.source = {**source_of(layout, gathered), "config": written}
    merge = options.merge and options.quantization.bits == 16
    if merge and gathered.adapters:
        gathered.state.update(merged(gathered.state, gathered.adapters))
    model = place(config, gathered.state, options, name=str(layout.path))
    loaded = finish(model, processor, {"base": portable(str(layout.folder)), "load": options.parts})
    loaded.context_len = int(layout.config.get("max_sequence_length") or loaded.context_len)
    if gathered.adapters and not merge:
        loaded.model = cast(Any, attach(model, gathered.adapters))
    return loaded


def with_base(layout: Layout, options: ForeignOptions) -> tuple[Layout, Layout | None]:
    """Return the checkpoint, with missing settings taken from its base, and the base itself.

    Raises:
        CheckpointError: a base is needed and not given, or its kind does not fit.
    """
    if layout.kind == "legacy":
        base = sniff(local_folder(options.base)) if options.base else None
        return layout, base
    named = options.base or layout.adapter.get("base_model_name_or_path") or layout.config.get("_name_or_path")
    given = bool(options.base)
    if named is None or not (given or Path(named).is_dir() or (layout.folder / named).is_dir()):
        words = f" (it names {named!r}, which is not a folder here)" if named else ""
        raise CheckpointError(
            f"{layout.path} is {KINDS[layout.kind]}, which needs the language model it was trained on{words}; "
            "pass it with --model-base"
        )
    folder = local_folder(named) if given or Path(named).is_dir() else layout.folder / named
    base = sniff(folder)
    if base.kind not in ("language_model", "legacy"):
        raise CheckpointError(
            f"{folder} is {KINDS[base.kind]}; {layout.path} needs the plain language model it was trained on"
        )
    is_whole = "hidden_size" in layout.config
    return (layout if is_whole else replace(layout, config={**base.config, **layout.config})), base


def tokenizer_folder(layout: Layout, base: Layout | None) -> Path:
    """Return the folder whose tokenizer a checkpoint uses: its own, else its base's.

    Raises:
        CheckpointError: neither has one.
    """
    for part in (layout, base):
        if part is not None and part.has_tokenizer:
            return part.folder
    raise CheckpointError(f"{layout.path} has no tokenizer; pass the model it was trained from with --model-base")


def gather(layout: Layout, base: Layout | None, options: ForeignOptions, markers: Sequence[int]) -> Gathered:
    """Collect all weights under our names, memory-mapped from the files, with adapters apart.

    Args:
        layout: the checkpoint.
        base: what it builds on.
        options: parts that were given.
        markers: see `marker_rows`.

    Raises:
        CheckpointError: a part is missing, or a tensor belongs to no part.
    """
    state: dict[str, Tensor] = {}
    buffers: dict[str, str] = {}
    if layout.kind != "legacy" and base is not None:
        _take(state, buffers, base)
    adapters: list[LegacyLora] = []
    if layout.kind == "legacy":
        _take(state, buffers, layout)
    elif layout.kind == "legacy_adapter":
        adapters.append(read_lora(layout.folder))
        if not layout.extra:
            raise CheckpointError(f"{layout.path} has no {EXTRA_FILE}, which holds its projector")
        _take_projector(state, open_tensors(layout.folder / EXTRA_FILE), layout, markers)
    else:
        file = layout.path if layout.path.is_file() else next(iter(layout.tensors.values())).file
        _take_projector(state, open_tensors(file), layout, markers)
    if EMBEDDINGS not in state:
        raise CheckpointError(f"{layout.path} has no language model; expected model.embed_tokens.weight")
    tower, vision_config = _take_tower(state, layout, options)
    folder = options.tower_adapter or layout.tower_adapter
    if folder is not None:
        adapters.append(read_lora(tower_adapter_folder(Path(folder)), tower=True))
    elif adapters:
        check_copies(adapters[0])
    return Gathered(state, adapters, tower, vision_config, buffers, state[EMBEDDINGS].shape[0])


def _take(state: dict[str, Tensor], buffers: dict[str, str], layout: Layout) -> None:
    """Add the weights of a legacy checkpoint or a plain language model, under our names."""
    trunk: dict[str, Tensor] = {}
    for name, tensor in TensorReader(layout.tensors):
        if is_buffer(name):
            kind = next(kind for kind, pattern in BUFFERS.items() if pattern.fullmatch(name))
            buffers[kind] = str(tensor.dtype).removeprefix("torch.")
            continue
        ours = renamed(name, LEGACY_PREFIXES)
        if ours is None:
            raise CheckpointError(
                f"{layout.path}: tensor {name} belongs to no part of the model; see `llava checkpoint inspect`"
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


def _take_projector(state: dict[str, Tensor], reader: TensorReader, layout: Layout, markers: Sequence[int]) -> None:
    """Add the projector's weights of a file, and embedding rows trained with them, see `take_rows`."""
    for name in [name for name in state if name.startswith(PROJECTOR)]:
        del state[name]
    for name, tensor in reader:
        suffix = projector_suffix(name)
        if suffix is not None:
            state[PROJECTOR + suffix] = tensor
        elif name.endswith("embed_tokens.weight"):
            take_rows(state, tensor, layout, markers)
        elif name.endswith(NEWLINE):
            state[f"model.{NEWLINE}"] = tensor
        elif "lora_" not in name:
            raise CheckpointError(f"{layout.path}: tensor {name} belongs to neither the projector nor the embeddings")


def _take_tower(state: dict[str, Tensor], layout: Layout, options: ForeignOptions) -> tuple[TowerSource, Any]:
    """Return the tower's source and configuration; add its weights if they are not there yet."""
    is_inside = any(name.startswith(TOWER) for name in state)
    source = find_tower(
        layout if is_inside == layout.has_tower else replace(layout, tensors={}),
        options.vision_tower,
        options.vision_tower_config,
        options.vision_tower_checkpoint,
    )
    if is_inside:
        logger.info("%s: vision tower from the checkpoint itself", layout.path)
        return source, source.config()
    dtype = state[EMBEDDINGS].dtype
    tower = source.load(dtype)
    state.update({TOWER + name: tensor for name, tensor in tower.state_dict().items() if not is_buffer(name)})
    logger.info("%s: vision tower from %s", layout.path, source.checkpoint or source.name)
    return source, tower.config


def tower_adapter_folder(folder: Path) -> Path:
    """Return the folder itself, or the one inside that holds a tower's adapter.

    Raises:
        CheckpointError: neither holds one.
    """
    layout = sniff(folder)
    if layout.kind == "tower_adapter":
        return folder
    if layout.tower_adapter is not None:
        return layout.tower_adapter
    raise CheckpointError(f"{folder} is {KINDS[layout.kind]}; expected the folder of a vision tower's adapter")


def make_config(layout: Layout, text: Any, gathered: Gathered, processor: Any) -> LlavaMedConfig:
    """Return our configuration of a legacy checkpoint.

    Raises:
        CheckpointError: the tower lacks the selected layer.
    """
    kind, settings = projector_settings(layout)
    layer, num_layers = select_layer(layout), int(gathered.vision_config.num_hidden_layers)
    for reason in layer_refusals(layer, num_layers):  # for a tower that was found only now
        raise CheckpointError(f"{layout.path}: {reason}")
    text.vocab_size = gathered.state[EMBEDDINGS].shape[0]
    markers = [word for word in processor.marker_ids if word is not None] if processor.use_im_start_end else None
    return LlavaMedConfig(
        vision_config=gathered.vision_config,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.num_image_tokens,
        vision_feature_select_strategy=cast(Any, SELECT_STRATEGIES[select_feature(layout)]),
        vision_feature_layer=layer,
        projector_type=kind,
        projector_kwargs=settings,
        use_im_start_end=processor.use_im_start_end,
        marker_token_ids=markers,
        template=processor.template.name,
        placement=processor.placement,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def source_of(layout: Layout, gathered: Gathered) -> dict[str, Any]:
    """Return what is needed to write the same format again."""
    tower = "timm" if layout.has_timm_tower else "inside" if layout.has_tower else "beside"
    files = [entry.file.suffix for entry in layout.tensors.values()]
    return {
        "kind": layout.kind,
        "style": layout.style,
        "num_rows": gathered.num_rows,
        "loaded_rows": gathered.state[EMBEDDINGS].shape[0],
        "tower": tower,
        "buffers": gathered.buffers,
        "safe": ".safetensors" in files,
    }
