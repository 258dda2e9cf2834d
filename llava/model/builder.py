"""New models from a causal language model and a vision tower, each given by path or hub name.

language model + tower --(placeholder and marker tokens, fresh projector)--> LlavaMedForConditionalGeneration
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llava.constants import IM_END_TOKEN, IM_PATCH_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from llava.errors import CheckpointError, ConfigError
from llava.jinja_template import AUTO, check_name, choose_template
from llava.model.anyres import fresh_newline, needs_newline, write_policy
from llava.model.attention import use_tree_attention
from llava.model.config import LlavaMedConfig
from llava.model.fitting import check_processor
from llava.model.language_models import language_config, language_trunk
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.open_clip_encoder.loading import (
    FOLDER_PREFIX,
    HUB_PREFIX,
    find_checkpoint,
    find_config,
)
from llava.model.multimodal_encoder.towers import (
    UNREADABLE,
    first_line,
    load_part,
    load_tower,
    num_extra_tokens,
    num_patches,
    tower_image_processor,
)
from llava.model.multimodal_projector import build_projector, check_projector_type
from llava.model.quantization import Quantization
from llava.model.rope import forget_lengths
from llava.processing import LlavaMedProcessor
from llava.tokenization import read_tokenizer
from llava.utils.lookup import require

logger = logging.getLogger(__name__)

SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""transformers' name for each value of `mm_vision_select_feature` in the original trainers."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Settings of a new model; saved with adapters and projectors, which need the same parts again.

    Attributes:
        lm: folder or hub name of a causal language model.
        vision_tower: folder or hub name of a CLIP, SigLIP, DINOv2 or ViT encoder, or of an open_clip model.
        vision_tower_config: open_clip model configuration; with `vision_tower_checkpoint` the tower needs no folder.
        vision_tower_checkpoint: open_clip weights.
        projector_type: `linear`, `mlpKx_gelu`, `cluster` or `identity`.
        projector_kwargs: settings of the projector, for `cluster` (see `cluster_projector`).
        select_layer: hidden state of the tower that is used; -2 is the second to last.
        select_feature: `patch` or `cls_patch`.
        use_im_start_end: write marker tokens around each image.
        use_im_patch_token: add the (unused) patch token, as old vocabularies have it.
        template: conversation template; `auto` for that of the language model.
        chat_template: text of a chat template that replaces that of the tokenizer, for `auto`.
        image_mode: how images become the tower's input.
        patch_merge_type: how the tiles of mode `anyres` are joined, see `imaging.anyres.MERGE_TYPES`.
        image_grid_pinpoints: [width, height] that `anyres` chooses from; None for those of LLaVA 1.6.
        placement: `front` or `as_written`.
        system: replaces the template's system text.
        image_size: pixels per side of the model's input; the tower's own size when None.
        bits, double_quant, quant_type: see `Quantization`; they apply to the language model.
        seed: seed of the projector's random weights.
    """

    lm: str
    vision_tower: str
    vision_tower_config: str | None = None
    vision_tower_checkpoint: str | None = None
    projector_type: str = "linear"
    projector_kwargs: dict[str, Any] | None = None
    select_layer: int = -2
    select_feature: str = "patch"
    use_im_start_end: bool = False
    use_im_patch_token: bool = False
    template: str = "vicuna_v1"
    chat_template: str | None = None
    image_mode: str = "square"
    patch_merge_type: str = "flat"
    image_grid_pinpoints: Any = None
    placement: str = "front"
    system: str | None = None
    image_size: int | None = None
    bits: int = 16
    double_quant: bool = True
    quant_type: str = "nf4"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings before anything large is read."""
        if not self.vision_tower:
            raise ConfigError("a new model needs a vision tower; pass its folder or hub name with --vision-tower")
        if self.select_feature not in SELECT_STRATEGIES:
            known = ", ".join(SELECT_STRATEGIES)
            raise ConfigError(f"unknown select_feature {self.select_feature!r}; known: {known}")
        check_projector_type(self.projector_type)
        check_name(self.template)

    @property
    def tower_files(self) -> dict[str, str | None]:
        """The open_clip files, as keyword arguments of `load_tower` and `tower_image_processor`."""
        return {"config_file": self.vision_tower_config, "checkpoint": self.vision_tower_checkpoint}


@dataclass(slots=True)
class LoadedModel:
    """Model ready for use, its processor, and the origin of its parts (`base` path or build options)."""

    model: LlavaMedForConditionalGeneration
    processor: LlavaMedProcessor
    context_len: int
    origin: dict[str, Any] = field(default_factory=dict)


def build_model(
    lm: str,
    vision_tower: str,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device_map: Any = None,
    **options: Any,
) -> LoadedModel:
    """Build a model from a language model and a vision tower, with a new projector.

    Args:
        lm: folder or hub name of a causal language model.
        vision_tower: folder or hub name of a vision encoder.
        dtype: dtype of all weights; "auto" is the dtype in which the language model was saved.
        device_map: placement of the language model, passed to transformers; tower and projector follow its embeddings.
        options: fields of `BuildOptions`.

    Raises:
        ConfigError: an option is unknown or does not fit the parts.
        CheckpointError: a part cannot be loaded, or its type does not fit.

    >>> loaded = build_model(lm_folder, tower_folder, projector_type="mlp2x_gelu", template="vicuna_v1")
    >>> loaded.processor.template.name
    'vicuna_v1'
    """
    wanted = portable_tower(BuildOptions(lm=portable_path(lm), vision_tower=vision_tower, **options))
    text_config = language_config(wanted.lm)
    if dtype == "auto":
        saved = getattr(text_config, "dtype", None)
        dtype = saved if isinstance(saved, torch.dtype) else torch.float32
    # Unused parts that a checkpoint lacks are initialized randomly: under the seed, so equal builds have equal hashes.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(wanted.seed)
        quantization = Quantization(wanted.bits, wanted.double_quant, wanted.quant_type).config(dtype)
        keywords = {"quantization_config": quantization, "device_map": device_map}
        language_model = load_part(AutoModelForCausalLM, wanted.lm, dtype, **keywords)
        language_trunk(language_model, wanted.lm)  # before the tower is read
        tower = load_tower(wanted.vision_tower, dtype, **wanted.tower_files)
        tokenizer = _tokenizer(wanted.lm)
        wanted = with_template(wanted, tokenizer)
        image_processor = tower_image_processor(
            wanted.vision_tower, tower.config, wanted.image_size, **wanted.tower_files
        )
        add_tokens(tokenizer, language_model, wanted)
        config = _config(wanted, tokenizer, language_model, tower, image_processor)
        processor = _processor(wanted, tokenizer, image_processor, num_image_tokens=config.image_seq_length)
        write_policy(config, processor.image_grid)
        model = _assemble(config, language_model, tower, seed=wanted.seed, dtype=dtype)
    return finish_model(model, processor, {"build": asdict(wanted)})


def with_template(options: BuildOptions, tokenizer: Any) -> BuildOptions:
    """Return the options with the template that `auto` chooses.

    A tokenizer without a chat template may receive one.
    """
    if options.template != AUTO:
        return options
    if options.chat_template is None:
        name, text = choose_template(tokenizer)
        if text is not None or name != AUTO:
            logger.info("%s has no chat template; using %s", options.lm, "plain roles" if text else f"template {name}")
        options = replace(options, template=name, chat_template=text)
    if options.chat_template is not None:
        tokenizer.chat_template = options.chat_template
    return options


def _processor(
    options: BuildOptions, tokenizer: Any, image_processor: Any, *, num_image_tokens: int
) -> LlavaMedProcessor:
    return LlavaMedProcessor(
        tokenizer,
        image_processor,
        template=options.template,
        image_mode=options.image_mode,
        num_image_tokens=num_image_tokens,
        placement=options.placement,
        use_im_start_end=options.use_im_start_end,
        system=options.system,
        patch_merge_type=options.patch_merge_type,
        image_grid_pinpoints=options.image_grid_pinpoints,
    )


def portable_path(path: str) -> str:
    """Return a folder's absolute path, which saved records can use anywhere, or a hub name unchanged.

    Raises:
        CheckpointError: a path does not exist (the hub client would look for it on the hub, retrying for minutes).
    """
    if not path:
        return path
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or folder.exists():
        raise CheckpointError(f"{path}: no such folder; expected a model folder or a hub name such as owner/model")
    return path


def portable_tower(options: BuildOptions) -> BuildOptions:
    """Return the options with the absolute path of the tower's folder, or those of its two files.

    Raises:
        CheckpointError: a path does not exist.
    """
    tower = options.vision_tower
    if options.vision_tower_config and options.vision_tower_checkpoint:
        config, checkpoint = find_config(options.vision_tower_config), find_checkpoint(options.vision_tower_checkpoint)
        return replace(
            options, vision_tower_config=str(config.resolve()), vision_tower_checkpoint=str(checkpoint.resolve())
        )
    if tower.startswith(HUB_PREFIX):
        return options
    return replace(options, vision_tower=portable_path(tower.removeprefix(FOLDER_PREFIX)))


def finish_model(
    model: LlavaMedForConditionalGeneration, processor: LlavaMedProcessor, origin: dict[str, Any]
) -> LoadedModel:
    """Set tree attention and generation ids of a model, and return it with its context length.

    Raises:
        CheckpointError: the processor does not fit the model.
    """
    check_processor(model, processor, str(origin.get("base", "the model")))
    use_tree_attention(model)
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id = processor.pad_token_id, processor.eos_token_id
    context_len = int(getattr(model.config.text_config, "max_position_embeddings", 2048))
    return LoadedModel(model, processor, context_len, origin)


def _tokenizer(lm: str) -> Any:
    try:
        return read_tokenizer(lm)
    except UNREADABLE as error:
        raise CheckpointError(f"{lm} holds no usable tokenizer: {first_line(error)}") from error


@contextmanager
def gathered_weight(weight: Tensor) -> Iterator[None]:
    """Gather a weight that ZeRO-3 shards over ranks for the length of the block; every rank may write it."""
    if not hasattr(weight, "ds_id"):
        yield
        return
    with require("deepspeed", "train").zero.GatheredParameters([weight], modifier_rank=0):
        yield


def add_tokens(tokenizer: Any, language_model: PreTrainedModel, options: BuildOptions) -> None:
    """Add the placeholder and marker tokens to the vocabulary; new rows are the mean of the old ones.

    The embedding table is never shrunk: published models hold more rows than their tokenizer has tokens.
    """
    wanted = [IM_PATCH_TOKEN] if options.use_im_patch_token else []
    wanted += [IM_START_TOKEN, IM_END_TOKEN] if options.use_im_start_end else []
    wanted += [IMAGE_TOKEN]
    known = tokenizer.get_vocab()
    added = [token for token in wanted if token not in known]
    if not added:
        return
    tokenizer.add_tokens(added, special_tokens=True)
    new_rows = [int(tokenizer.convert_tokens_to_ids(token)) for token in added]
    first_new, num_rows = min(new_rows), max(new_rows) + 1
    table = cast(Any, language_model.get_input_embeddings()).weight
    if num_rows > getattr(table, "ds_shape", table.shape)[0]:
        language_model.resize_token_embeddings(num_rows, mean_resizing=False)
    for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        for values in (cast(Any, layer).weight, getattr(layer, "bias", None)):
            if values is not None:
                with torch.no_grad(), gathered_weight(values):
                    values[new_rows] = values[:first_new].mean(dim=0, dtype=torch.float32).to(values.dtype)


def _config(
    options: BuildOptions, tokenizer: Any, language_model: PreTrainedModel, tower: PreTrainedModel, processor: Any
) -> LlavaMedConfig:
    num_layers = int(tower.config.num_hidden_layers)
    if not -num_layers - 1 <= options.select_layer <= num_layers:
        raise ConfigError(
            f"select_layer is {options.select_layer}; the tower has {num_layers} layers, so expected "
            f"{-num_layers - 1} to {num_layers}"
        )
    full = options.select_feature == "cls_patch"
    markers = [IM_START_TOKEN, IM_END_TOKEN] if options.use_im_start_end else []
    return LlavaMedConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=num_patches(processor, tower.config) + (num_extra_tokens(tower.config) if full else 0),
        vision_feature_select_strategy=cast(Any, SELECT_STRATEGIES[options.select_feature]),
        vision_feature_layer=options.select_layer,
        projector_type=options.projector_type,
        projector_kwargs=options.projector_kwargs,
        use_im_start_end=options.use_im_start_end,
        marker_token_ids=tokenizer.convert_tokens_to_ids(markers) or None,
        template=options.template,
        placement=options.placement,
        head_bias=getattr(language_model.get_output_embeddings(), "bias", None) is not None,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )


def _assemble(
    config: LlavaMedConfig, language_model: PreTrainedModel, tower: PreTrainedModel, *, seed: int, dtype: torch.dtype
) -> LlavaMedForConditionalGeneration:
    """Return the model around existing parts, without a second copy of their weights."""
    # Under ZeRO-3 transformers shards every new weight over the ranks, which needs real ones; they are small there.
    table = cast(Any, language_model.get_input_embeddings()).weight
    cast(Any, config.text_config).vocab_size = getattr(table, "ds_shape", table.shape)[0]
    with nullcontext() if is_deepspeed_zero3_enabled() else torch.device("meta"):
        model = LlavaMedForConditionalGeneration(config)
    torch.manual_seed(seed)
    projector: nn.Module = build_projector(config)
    model.model.multi_modal_projector = projector.to(table.device, dtype)
    if needs_newline(config):
        model.model.image_newline = fresh_newline(table, dtype)
    model.model.vision_tower = cast(Any, tower).to(table.device)
    model.model.language_model = cast(Any, language_trunk(language_model, "the language model"))
    forget_lengths(model.model.language_model)
    model.lm_head = language_model.get_output_embeddings()
    # One configuration object, so that an attribute set on the model's configuration reaches the part.
    model.model.language_model.config = model.config.text_config
    model.model.vision_tower.config = model.config.vision_config
    model.tie_weights()
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(language_model, name):
            setattr(model, name, getattr(language_model, name))
    return model


def load_pretrained_model(*args: Any, **options: Any) -> Any:
    """Return tokenizer, model, image processor and context length, as published snippets expect.

    The function is `llava.generation.published.load_pretrained_model`, looked up here because it is above this module.
    """
    return importlib.import_module("llava.generation.published").load_pretrained_model(*args, **options)
