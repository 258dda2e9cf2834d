"""Model against transformers' Llava with equal weights: logits, loss, gradients, cache, generation."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava.model.builder import LoadedModel
from llava.model.lora import freeze_for
from tests.support.model_tools import batch
from tests.support.tiny import LANGUAGE_MODELS, tiny_llava

NAMES = {
    "multi_modal_projector.0.": "multi_modal_projector.linear_1.",
    "multi_modal_projector.2.": "multi_modal_projector.linear_2.",
}


def library_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def library_model(loaded: LoadedModel) -> LlavaForConditionalGeneration:
    """Return transformers' Llava with our weights."""
    config = loaded.model.config
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_index=config.image_token_id,
            image_seq_length=config.image_seq_length,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    state = {library_name(name): tensor for name, tensor in loaded.model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lm", "tower", "tie", "feature"),
    [
        ("llama", "clip", False, "patch"),
        ("mistral", "dinov2", True, "cls_patch"),
        ("qwen2", "siglip", True, "cls_patch"),
        ("llama", "vit", False, "patch"),
    ],
)
def test_logits_loss_and_gradients(lm: str, tower: str, tie: bool, feature: str) -> None:
    loaded = tiny_llava("mlp2x_gelu", tower, lm, tie=tie, select_feature=feature)
    ours, theirs = loaded.model, library_model(loaded)
    inputs = wide_batch(loaded)
    freeze_for(ours, train_tower=True)
    output, expected = ours(**inputs), theirs(**inputs)
    close(output.logits, expected.logits)
    close(output.loss, expected.loss)
    output.loss.backward()
    expected.loss.backward()
    gradients = {library_name(name): parameter.grad for name, parameter in ours.named_parameters()}
    compared = 0
    for name, parameter in theirs.named_parameters():
        assert (gradients[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            close(gradients[name], parameter.grad)
            compared += 1
    assert compared > 40


def wide_batch(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return the batch of the model tests with one placeholder for each image token of this model."""
    inputs = batch(loaded)
    image = loaded.processor.image_token_id
    num = loaded.processor.num_image_tokens
    rows = []
    for row in inputs["input_ids"].tolist():
        first = row.index(image)
        rows.append([*row[:first], *[image] * num, *[token for token in row[first:] if token != image]])
    ids = torch.tensor(rows)
    return {**inputs, "input_ids": ids, "labels": ids.clone()}


def test_padded_rows_equal_single_ones() -> None:
    loaded = tiny_llava()
    inputs = batch(loaded)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    with torch.no_grad():
        together = loaded.model(input_ids=padded, attention_mask=mask, pixel_values=pixels).logits[:, 3:]
        for row in range(2):
            alone = loaded.model(input_ids=ids[row : row + 1], pixel_values=pixels[row : row + 1]).logits
            close(together[row : row + 1], alone)


@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
def test_cache_equals_no_cache(lm: str) -> None:
    loaded = tiny_llava(lm=lm)
    inputs = batch(loaded)
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = loaded.model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits
        prefix = loaded.model(input_ids=ids[:, :7], pixel_values=inputs["pixel_values"], use_cache=True)
        steps, cache = [prefix.logits], prefix.past_key_values
        for position in range(7, ids.shape[1]):
            output = loaded.model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            steps.append(output.logits)
            cache = output.past_key_values
    close(torch.cat(steps, dim=1), whole)


def test_generation_is_the_librarys() -> None:
    loaded = tiny_llava()
    theirs = library_model(loaded)
    inputs: Mapping[str, Tensor] = {name: tensor for name, tensor in batch(loaded).items() if name != "labels"}
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    assert torch.equal(loaded.model.generate(**inputs, **settings), theirs.generate(**inputs, **settings))


def test_cached_features_equal_pixels() -> None:
    loaded = tiny_llava()
    inputs = batch(loaded)
    features = loaded.model.tower_features(inputs["pixel_values"])
    assert features.shape == (2, 4, 32)
    assert not features.requires_grad or any(p.requires_grad for p in loaded.model.model.vision_tower.parameters())
    from_pixels = loaded.model(**inputs)
    from_features = loaded.model(**{**inputs, "pixel_values": features.detach()})
    assert torch.equal(from_pixels.logits, from_features.logits)


def test_a_wrong_number_of_placeholders_is_an_error() -> None:
    loaded = tiny_llava()
    inputs = batch(loaded)
    inputs["input_ids"][0, 2] = 9
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        loaded.model(**inputs)
