"""A new model from a causal language model and a vision tower, both by path or hub name.

language model + tower --(place holder and marker tokens, fresh projector)--> LlavaMedForConditionalGeneration
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from llava.constants import IM_END_TOKEN, IM_PATCH_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from llava.errors import CheckpointError, ConfigError
from llava.model.attention import use_tree_attention
from llava.model.config import LlavaMedConfig
from llava.model.modeling import LlavaMedForConditionalGeneration, num_extra_tokens
from llava.model.multimodal_projector import build_projector
from llava.model.quantization import quantization_config
from llava.processing import LlavaMedProcessor

SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""The seeds' `mm_vision_select_feature` in transformers' words."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How the parts are put together; saved beside adapters and projectors, which need the same parts again.

    Attributes:
        lm: folder or hub name of a causal language model.
        vision_tower: folder or hub name of a CLIP, SigLIP, DINOv2 or ViT encoder.
        projector_type: `linear`, `mlpKx_gelu` or `identity`.
        select_layer: hidden state of the tower that is used; -2 is the last but one.
        select_feature: `patch` or `cls_patch`.
        use_im_start_end: write marker tokens around each image.
        use_im_patch_token: add the (unused) patch token, as old vocabularies have it.
        template: conversation template.
        image_mode: how pictures become square.
        placement: `front` or `as_written`.
        system: replaces the template's system text.
        image_size: pixels of the model's input; the tower's own size when None.
        bits: 16 keeps the dtype, 8 and 4 quantize the language model (bitsandbytes).
        seed: of the projector's random weights.
    """

    lm: str
    vision_tower: str
    projector_type: str = "linear"
    select_layer: int = -2
    select_feature: str = "patch"
    use_im_start_end: bool = False
    use_im_patch_token: bool = False
    template: str = "vicuna_v1"
    image_mode: str = "square"
    placement: str = "front"
    system: str | None = None
    image_size: int | None = None
    bits: int = 16
    seed: int = 0


@dataclass(slots=True)
class Loaded:
    """A model ready for use, its processor, and where its parts come from (`base` path or build options)."""

    model: LlavaMedForConditionalGeneration
    processor: LlavaMedProcessor
    context_len: int
    origin: dict[str, Any] = field(default_factory=dict)


def build(lm: str, vision_tower: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Loaded:
    """Put a language model and a tower together with a fresh projector; `options` are those of `BuildOptions`.

    Raises:
        ConfigError: an unknown option or one that does not fit the parts.
        CheckpointError: a part cannot be loaded.
    """
    wanted = BuildOptions(lm=lm, vision_tower=vision_tower, **options)
    if wanted.select_feature not in SELECT_STRATEGIES:
        raise ConfigError(f"unknown select_feature {wanted.select_feature!r}; known: {', '.join(SELECT_STRATEGIES)}")
    tokenizer = AutoTokenizer.from_pretrained(lm)
    language_model = _load(AutoModelForCausalLM, lm, dtype, quantization_config=quantization_config(wanted.bits, dtype))
    tower = load_tower(vision_tower, dtype)
    image_processor = tower_image_processor(vision_tower, tower.config, wanted.image_size)
    add_tokens(tokenizer, language_model, wanted)
    config = _config(wanted, tokenizer, language_model, tower, image_processor)
    model = _assemble(config, language_model, tower, seed=wanted.seed, dtype=dtype)
    processor = LlavaMedProcessor(
        tokenizer,
        image_processor,
        template=wanted.template,
        image_mode=wanted.image_mode,
        num_image_tokens=config.image_seq_length,
        placement=wanted.placement,
        use_im_start_end=wanted.use_im_start_end,
        system=wanted.system,
    )
    return finish(model, processor, {"build": asdict(wanted)})


def finish(model: LlavaMedForConditionalGeneration, processor: LlavaMedProcessor, origin: dict[str, Any]) -> Loaded:
    """Settle what every loaded model needs: tree attention, generation ids, context length."""
    use_tree_attention(model)
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id = processor.pad_token_id, processor.eos_token_id
    context_len = int(getattr(model.config.text_config, "max_position_embeddings", 2048))
    return Loaded(model, processor, context_len, origin)


def _load(auto_class: Any, path: str, dtype: torch.dtype, **keywords: Any) -> PreTrainedModel:
    try:
        return cast(PreTrainedModel, auto_class.from_pretrained(path, dtype=dtype, **keywords))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be loaded as {auto_class.__name__}: {error}") from error


def load_tower(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The vision encoder of a folder or hub name; of a two-tower model (CLIP, SigLIP) only its vision half.

    Raises:
        CheckpointError: there is no such model, or it has no vision encoder.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"vision tower {path} cannot be loaded: {error}") from error
    vision_config = getattr(config, "vision_config", config)
    if not hasattr(vision_config, "patch_size"):
        raise CheckpointError(f"{path} ({config.model_type}) is no vision tower; expected CLIP, SigLIP, DINOv2 or ViT")
    tower = _load(MODEL_MAPPING[type(vision_config)], path, dtype, config=vision_config)
    tower.eval()
    return tower


def tower_image_processor(path: str, config: Any, image_size: int | None) -> Any:
    """The tower's image processor in its exact PIL form, for inputs of `image_size` (default: the tower's) pixels.

    Raises:
        ConfigError: the size is no multiple of the patch size.
    """
    try:
        processor = cast(Any, AutoImageProcessor).from_pretrained(path, backend="pil")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has no usable preprocessor_config.json: {error}") from error
    if image_size is None:
        return processor
    if image_size % config.patch_size:
        raise ConfigError(f"image size {image_size} is no multiple of the tower's patch size {config.patch_size}")
    if getattr(processor, "do_center_crop", False):
        processor.crop_size = {"height": image_size, "width": image_size}
        processor.size = {"shortest_edge": image_size}
    else:
        processor.size = {"height": image_size, "width": image_size}
    return processor


def input_size(image_processor: Any) -> int:
    """Pixels on a side that an image processor delivers."""
    crops = getattr(image_processor, "do_center_crop", False)
    size = image_processor.crop_size if crops else image_processor.size
    return int(size["height"] if "height" in size else size["shortest_edge"])


def add_tokens(tokenizer: Any, language_model: PreTrainedModel, options: BuildOptions) -> None:
    """Give the vocabulary its place holder and markers; new rows are the mean of the old ones (specification 1.2).

    The embedding is never shrunk: published models hold more rows than their tokenizer has words.
    """
    wanted = [IM_PATCH_TOKEN] if options.use_im_patch_token else []
    wanted += [IM_START_TOKEN, IM_END_TOKEN] if options.use_im_start_end else []
    wanted += [IMAGE_TOKEN]
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in wanted if token not in known], special_tokens=True)
    old_rows = cast(Tensor, language_model.get_input_embeddings().weight).shape[0]
    first_new = len(known)
    if len(tokenizer) > old_rows:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            weight = cast(Tensor, layer.weight)
            weight[first_new : len(tokenizer)] = weight[:first_new].mean(dim=0, dtype=torch.float32).to(weight.dtype)


def _config(
    options: BuildOptions, tokenizer: Any, language_model: PreTrainedModel, tower: PreTrainedModel, processor: Any
) -> LlavaMedConfig:
    vision = tower.config
    patches = (input_size(processor) // vision.patch_size) ** 2
    full = options.select_feature == "cls_patch"
    return LlavaMedConfig(
        vision_config=vision,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=patches + (num_extra_tokens(vision) if full else 0),
        vision_feature_select_strategy=cast(Any, SELECT_STRATEGIES[options.select_feature]),
        vision_feature_layer=options.select_layer,
        projector_type=options.projector_type,
        use_im_start_end=options.use_im_start_end,
        image_aspect_ratio=options.image_mode,
        template=options.template,
        placement=options.placement,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )


def _assemble(
    config: LlavaMedConfig, language_model: PreTrainedModel, tower: PreTrainedModel, *, seed: int, dtype: torch.dtype
) -> LlavaMedForConditionalGeneration:
    """The model around existing parts; its skeleton is made without memory, so nothing is held twice."""
    with torch.device("meta"):
        model = LlavaMedForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector: nn.Module = build_projector(config).to(dtype)
    model.model.multi_modal_projector = projector
    model.model.vision_tower = tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    embedding = cast(Tensor, language_model.get_input_embeddings().weight)
    cast(Any, model.config.text_config).vocab_size = embedding.shape[0]
    model.tie_weights()
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(language_model, name):
            setattr(model, name, getattr(language_model, name))
    return model
