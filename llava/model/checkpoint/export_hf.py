"""Export our models to folders that transformers and vLLM load.

Names are those of the published `llava-hf` checkpoints, which both read. A model that transformers' Llava cannot
represent is rejected, so an export always has the same logits.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast
from transformers.activations import ACT2FN
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava.constants import IMAGE_TOKEN
from llava.errors import CheckpointError
from llava.imaging.image_processor import OpenClipImageProcessorPil
from llava.jinja_template import JinjaTemplate
from llava.model.builder import LoadedModel
from llava.model.checkpoint.files.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter
from llava.model.checkpoint.folder import SOURCE_FOLDER, copy_source, name_known_class
from llava.model.checkpoint.model_card import write_card
from llava.model.checkpoint.plugged import SOURCE_KEY, plugins_of
from llava.model.checkpoint.weight_names import HEAD, LANGUAGE_MODEL, PROJECTOR, TOWER, renamed_prefix
from llava.model.config import LlavaMedConfig
from llava.model.multimodal_encoder.towers import input_size, num_extra_tokens, square_side
from llava.model.projector_types import TransformersForm, find_type
from llava.processing import LlavaMedProcessor
from llava.template_forms import SLOT, Form
from llava.utils.folders import final_path
from llava.utils.jsonl import write_json

NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose published names contain `vision_model.`."""


def hf_obstacles(loaded: LoadedModel) -> list[str]:
    """Return why transformers' Llava cannot represent a model; empty if it can."""
    config: Any = loaded.model.config
    vision: Any = config.vision_config
    processor = loaded.processor
    found = []
    if transformers_form(config) is None:
        found.append(f"projector {config.projector_type!r}; it has two linear layers around an activation, or one")
    else:
        found += projector_obstacles(config.projector_type, loaded.model.model.multi_modal_projector)
    if config.head_bias:
        found.append("a bias in the language model's head")
    if config.vision_feature_select_strategy == "default" and num_extra_tokens(vision) > 1:
        found.append("register tokens in the tower; it drops the first token only")
    if not vision.model_type.startswith("dinov2") and input_size(processor.image_processor) != square_side(
        vision.image_size
    ):
        found.append("another input size than the tower's own")
    if config.patch_merge_type == "spatial_unpad":
        found.append("a trained token at the end of each row of patches (mm_patch_merge_type spatial_unpad)")
    if processor.image_mode not in ("square", "pad"):
        found.append(f"image mode {processor.image_mode!r}")
    if isinstance(processor.image_processor, OpenClipImageProcessorPil):
        found.append("the preprocessing of open_clip, which crops other pixels")
    if processor.strip_around_images:
        found.append("text that is stripped around images (LLaVA-Med 1.0)")
    return found


@torch.no_grad()
def projector_obstacles(name: str, projector: nn.Module) -> list[str]:
    """Return why the projector of a plug-in is not what its form for transformers says; empty if it is."""
    kind = find_type(name)
    if kind is None or kind.build is None or kind.transformers is None:
        return []
    form = kind.transformers
    if form.activation not in ACT2FN:
        return [f"projector {name!r} with the activation {form.activation!r}, which transformers does not have"]
    weights = {key: tensor.float().cpu() for key, tensor in projector.state_dict().items()}
    first = weights[f"{form.first}weight"], weights[f"{form.first}bias"]
    features = torch.randn(1, 4, first[0].shape[1], generator=torch.Generator().manual_seed(0))
    expected = F.linear(features, *first)
    if form.second is not None:
        expected = F.linear(
            ACT2FN[form.activation](expected), weights[f"{form.second}weight"], weights[f"{form.second}bias"]
        )
    found = copy.deepcopy(projector).float().cpu().eval()(features)
    # Rounding of float32 sums in another order.
    if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        return []
    return [f"projector {name!r}, which computes something else than its form for transformers says"]


def transformers_form(config: LlavaMedConfig) -> TransformersForm | None:
    """Return how transformers' Llava holds the projector, or None if it cannot."""
    kind = find_type(config.projector_type)
    return None if kind is None else kind.transformers


def hf_name(name: str, vision_type: str, form: TransformersForm) -> str:
    """Return the published name of one of our weights."""
    if name.startswith(PROJECTOR):
        # A linear projector is the first of two layers, of which the second changes nothing.
        renamed = renamed_prefix(name.removeprefix(PROJECTOR), form.names())
        return f"multi_modal_projector.{renamed}"
    if name.startswith(TOWER):
        nested = "vision_model." if vision_type in NESTED_TOWERS else ""
        return f"vision_tower.{nested}{name.removeprefix(TOWER).removeprefix('vision_model.')}"
    if name.startswith(HEAD):
        return f"language_model.{name}"
    return "language_model.model." + name.removeprefix(LANGUAGE_MODEL)


def export_hf(
    loaded: LoadedModel,
    path: str | Path,
    *,
    source_folder: str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a folder for transformers' `LlavaForConditionalGeneration` and `AutoProcessor`.

    Args:
        loaded: the model, adapters merged.
        path: folder, created if needed.
        source_folder: original files of the checkpoint, see `folder.source_of`; they are copied.
        max_shard_bytes: see `ShardWriter`.

    Raises:
        CheckpointError: transformers' Llava cannot represent the model; the message lists all reasons.
    """
    if found := hf_obstacles(loaded):
        raise CheckpointError(
            f"transformers' Llava cannot represent this model: {'; '.join(found)}. Nothing was written; "
            "serve it with this package, or export with --to legacy"
        )
    target = Path(path)
    with ShardWriter(target, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in _weights(loaded):
            writer.add(name, tensor)
    write_json(target / "config.json", _config(loaded))
    loaded.model.generation_config.save_pretrained(target)
    _write_processor(loaded, target)
    write_card(final_path(target), target, "hf", loaded.model.config, loaded.origin)
    if source_folder is not None:
        config: Any = loaded.model.config
        copy_source(Path(source_folder), target / SOURCE_FOLDER, (config.source or {}).get("config") or {})


def _weights(loaded: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    config: Any = loaded.model.config
    form = transformers_form(config)
    assert form is not None  # `hf_obstacles` found none
    for name, tensor in loaded.model.state_dict().items():
        if not (name.startswith(HEAD) and config.tie_word_embeddings):
            yield hf_name(name, config.vision_config.model_type, form), tensor
    if form.second is None:
        width = loaded.model.state_dict()[f"{PROJECTOR}{form.first}bias"]
        yield "multi_modal_projector.linear_2.weight", torch.eye(len(width), dtype=width.dtype, device=width.device)
        yield "multi_modal_projector.linear_2.bias", torch.zeros_like(width)


def _config(loaded: LoadedModel) -> dict[str, Any]:
    config: Any = loaded.model.config
    processor = loaded.processor
    form = transformers_form(config)
    assert form is not None
    hf = LlavaConfig(
        vision_config=json.loads(config.vision_config.to_json_string(use_diff=False)),
        text_config=json.loads(config.text_config.to_json_string(use_diff=False)),
        image_token_index=config.image_token_id,
        image_seq_length=config.image_seq_length,
        vision_feature_layer=config.vision_feature_layer,
        projector_hidden_act=form.activation,
        vision_feature_select_strategy=cast(Any, _strategy(config)),
        tie_word_embeddings=config.tie_word_embeddings,
    )
    written: dict[str, Any] = json.loads(hf.to_json_string())
    written["architectures"] = ["LlavaForConditionalGeneration"]
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    written["dtype"] = written["torch_dtype"] = dtype  # the second is what transformers 4 reads
    written[SOURCE_KEY] = {
        "template": processor.template.name,
        "system": processor.system,
        "image_mode": processor.image_mode,
        "placement": processor.placement,
        "use_im_start_end": processor.use_im_start_end,
        "prefix_mark": "text" if processor.text.prefix_mark == "text" else "backend",  # see `plain_tokenizer`
        "add_bos": bool(processor.text.bos_ids),
        "dicom": processor.dicom.settings(),
        "fast_jpeg": processor.fast_jpeg,
        "source": config.source,
    }
    if names := plugins_of(config):
        written[SOURCE_KEY] |= {"projector": config.projector_type, "plugins": names}
    return written


def _strategy(config: LlavaMedConfig) -> str:
    """Return the select strategy; transformers' `default` drops the first token even without extra ones."""
    return "default" if config.vision_feature_select_strategy == "default" and _extra(config) else "full"


def _extra(config: LlavaMedConfig) -> int:
    return num_extra_tokens(config.vision_config)


def _write_processor(loaded: LoadedModel, target: Path) -> None:
    processor = loaded.processor
    config: Any = loaded.model.config
    own = processor.image_processor
    image_processor = LlavaImageProcessorPil(
        do_pad=processor.image_mode == "pad",
        do_resize=bool(own.do_resize),
        do_rescale=bool(own.do_rescale),
        rescale_factor=own.rescale_factor,
        do_normalize=bool(own.do_normalize),
        size=dict(own.size),
        crop_size=dict(own.crop_size) if getattr(own, "do_center_crop", False) else None,
        do_center_crop=bool(getattr(own, "do_center_crop", False)),
        image_mean=list(own.image_mean),
        image_std=list(own.image_std),
        resample=own.resample,
    )
    vision: Any = config.vision_config
    combined: Any = LlavaProcessor(
        image_processor,
        plain_tokenizer(processor),
        patch_size=square_side(vision.patch_size),
        vision_feature_select_strategy=_strategy(config),
        chat_template=chat_template(processor),
        image_token=processor.tokenizer.convert_ids_to_tokens(processor.image_token_id),
        num_additional_image_tokens=_extra(config),
    )
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as name:
        folder = Path(name)
        combined.save_pretrained(folder)
        image_processor.save_pretrained(folder)  # also as its own file, where transformers 4 looks for it
        name_known_class(folder)
        for file in sorted(folder.iterdir()):
            file.replace(target / file.name)


def plain_tokenizer(processor: LlavaMedProcessor) -> PreTrainedTokenizerFast:
    """Return a plain tokenizer with the ids of ours; its backend adds prefix marks and begin of text."""
    tokenizer: Any = processor.tokenizer
    backend = processor.text.plain_backend()
    if processor.text.bos_ids:
        bos = str(tokenizer.bos_token)
        special = [(bos, processor.text.bos_ids[0])]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=special
        )
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    given = {name: str(getattr(tokenizer, name)) for name in names if getattr(tokenizer, name, None)}
    given.setdefault("pad_token", tokenizer.convert_ids_to_tokens(processor.pad_token_id))
    limit = {"model_max_length": tokenizer.model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False, **given, **limit
    )


def chat_template(processor: LlavaMedProcessor) -> str:
    """Return the conversation template as a transformers chat template, with images in front of each turn."""
    template = processor.template
    if isinstance(template, JinjaTemplate):
        return _flat_messages(processor) + template.source
    form = template.form
    body = "".join(_literal(part, "content") for part, _ in form.human)
    first = "".join(_literal(part, "content") for part, _ in form.first) if form.first else body
    answer = "".join(_literal(part, "content") for part, _ in form.gpt)
    header = "".join(_literal(part, "content") for part in _header(form))
    return (
        f"{{%- set opening = {json.dumps(template.system)} -%}}"
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        "{%- set opening = messages[0]['content'] if messages[0]['content'] is string"
        " else messages[0]['content'][0]['text'] -%}"
        "{%- set messages = messages[1:] -%}{%- endif -%}"
        f"{{%- if opening -%}}{_literal(form.system, 'opening')}"
        f"{{%- else -%}}{_literal(form.no_system, 'opening')}{{%- endif -%}}"
        "{%- for message in messages -%}"
        f"{_content(processor)}"
        "{%- if message['role'] == 'assistant' -%}"
        + answer
        + "{%- elif loop.first -%}"
        + first
        + "{%- else -%}"
        + body
        + "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}" + header + "{%- endif -%}"
    )


def _flat_messages(processor: LlavaMedProcessor) -> str:
    """Return code that turns the content of all messages into text, for a template that takes text only."""
    system = processor.template.system
    opening = f"[{{'role': 'system', 'content': {json.dumps(system)}}}]" if system else "[]"
    return (
        "{%- set flat = namespace(messages=[]) -%}"
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        f"{{%- set flat.messages = {opening} -%}}{{%- endif -%}}"
        "{%- for message in messages -%}"
        f"{_content(processor)}"
        "{%- set flat.messages = flat.messages + [dict(message, content=content)] -%}"
        "{%- endfor -%}{%- set messages = flat.messages -%}"
    )


def _literal(text: str, variable: str) -> str:
    """Return text with a slot as template code: expressions, since Jinja strips line ends around blocks."""
    parts = [f"{{{{- {json.dumps(part)} -}}}}" if part else "" for part in text.split(SLOT)]
    return f"{{{{- {variable} -}}}}".join(parts)


def _header(form: Form) -> Iterator[str]:
    for part, _ in form.gpt:
        if SLOT in part:
            return
        yield part


def _content(processor: LlavaMedProcessor) -> str:
    """Return code that sets `content` to a message's images and text as our processor joins them."""
    token = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
    markers = ("<im_start>", "<im_end>") if processor.use_im_start_end else ("", "")
    wrap = ("", "") if isinstance(processor.template, JinjaTemplate) else processor.template.image_wrap
    image = IMAGE_TOKEN.join(wrap).replace(IMAGE_TOKEN, markers[0] + str(token) + markers[1])
    return (
        "{%- if message['content'] is string -%}{%- set content = message['content'] -%}{%- else -%}"
        "{%- set num_images = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}"
        "{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text')"
        " | join('') | trim -%}"
        f"{{%- set content = (({json.dumps(image + chr(10))} * num_images) ~ texts) | trim -%}}"
        "{%- endif -%}"
    )
