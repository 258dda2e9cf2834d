"""The model's own additions: frozen towers, mixed precision, registration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from llava.model.builder import LoadedModel
from llava.model.checkpoint.save import save_model
from llava.model.config import LlavaMedConfig
from llava.model.lora import freeze_for
from llava.model.modeling import LlavaMedForConditionalGeneration, LlavaMedModel
from tests.support.model_tools import batch, logits
from tests.support.tiny import tiny_llava


def test_frozen_towers_keep_no_graph(tiny: LoadedModel) -> None:
    pixels = batch(tiny)["pixel_values"]
    freeze_for(tiny.model, train_tower=True)
    assert tiny.model.tower_features(pixels).requires_grad
    freeze_for(tiny.model)
    assert not tiny.model.tower_features(pixels).requires_grad


@pytest.mark.parametrize("tower_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lm_dtype", [torch.float32, torch.bfloat16])
def test_parts_of_different_precision(tower_dtype: torch.dtype, lm_dtype: torch.dtype) -> None:
    loaded = tiny_llava()
    expected = logits(loaded)
    loaded.model.model.vision_tower.to(tower_dtype)
    loaded.model.model.language_model.to(lm_dtype)
    loaded.model.lm_head.to(lm_dtype)
    result = logits(loaded)
    assert result.dtype == lm_dtype
    assert (result.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_identity_projector_across_precisions() -> None:
    loaded = tiny_llava("identity")
    loaded.model.model.vision_tower.to(torch.bfloat16)
    assert logits(loaded).dtype == torch.float32


def test_several_layers_of_the_tower() -> None:
    loaded = tiny_llava("linear")
    pixels = batch(loaded)["pixel_values"]
    single = [loaded.model.tower_features(pixels)]
    loaded.model.config.vision_feature_layer = -3
    single.append(loaded.model.tower_features(pixels))
    loaded.model.config.vision_feature_layer = [-2, -3]
    assert torch.equal(loaded.model.tower_features(pixels), torch.cat(single, dim=-1))


def test_gradient_checkpointing_changes_nothing(tiny: LoadedModel) -> None:
    freeze_for(tiny.model)
    inputs = batch(tiny)
    tiny.model.train()
    tiny.model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in tiny.model.named_parameters() if p.grad is not None}
    tiny.model.zero_grad()
    tiny.model.gradient_checkpointing_enable({"use_reentrant": False})
    tiny.model(**inputs, use_cache=False).loss.backward()
    for name, parameter in tiny.model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_auto_classes_know_the_family(tmp_path: Path, tiny: LoadedModel) -> None:
    save_model(tiny.model, tiny.processor, tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LlavaMedConfig)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert isinstance(auto_class.from_pretrained(tmp_path), LlavaMedForConditionalGeneration)
    assert isinstance(AutoModel.from_pretrained(tmp_path), LlavaMedModel)


def test_the_configuration_survives_its_file(tmp_path: Path) -> None:
    loaded = tiny_llava("linear", use_im_start_end=True, template="v0", image_mode="pad", select_feature="cls_patch")
    loaded.model.config.save_pretrained(tmp_path)
    again = LlavaMedConfig.from_pretrained(tmp_path)
    for name in ("projector_type", "use_im_start_end", "marker_token_ids", "template", "placement", "image_seq_length"):
        assert getattr(again, name) == getattr(loaded.model.config, name)
    assert again.image_aspect_ratio == "pad"
    assert again.vision_feature_select_strategy == "full"
    assert again.text_config.vocab_size == loaded.model.config.text_config.vocab_size
