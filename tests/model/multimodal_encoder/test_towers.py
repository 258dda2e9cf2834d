"""Towers: selected tokens and layers, parts of two-tower models, sizes, image processors."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from llava.errors import CheckpointError, ConfigError
from llava.model.multimodal_encoder.towers import (
    input_size,
    load_tower,
    num_extra_tokens,
    num_patches,
    tower_image_processor,
)
from tests.support.tiny import TOWERS, tiny_llava, write_tiny_lm, write_tiny_tower
from tests.support.torch_programs import table, tensor, write_archive

PIXELS = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) - 0.5


def patch_states(tower: nn.Module, pixels: Tensor, name: str) -> list[Tensor]:
    """Return hidden states layer by layer: embeddings, then the output of every layer; patch tokens only."""
    embedded = tower.embeddings(pixels)
    if name == "clip":
        embedded = tower.pre_layrnorm(embedded)
    layers = tower.encoder.layers if hasattr(tower, "encoder") and hasattr(tower.encoder, "layers") else None
    if layers is None:
        layers = next(m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    states = [embedded]
    for layer in layers:
        out = layer(states[-1], **({"attention_mask": None} if name in ("clip", "siglip") else {}))
        states.append(out[0] if isinstance(out, tuple) else out)
    first = 0 if name == "siglip" else 1
    return [state[:, first:] for state in states]


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_features_are_the_patches_of_the_layer(name: str, layer: int) -> None:
    loaded = tiny_llava("linear", name, select_layer=layer)
    with torch.no_grad():
        expected = patch_states(loaded.model.model.vision_tower, PIXELS, name)[layer]
    features = loaded.model.tower_features(PIXELS)
    assert features.shape == (2, 4, 32)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TOWERS)
def test_class_token_on_request(name: str) -> None:
    loaded = tiny_llava("linear", name, select_feature="cls_patch")
    num_tokens = 4 + num_extra_tokens(loaded.model.config.vision_config)
    assert num_tokens == (4 if name == "siglip" else 5)
    assert loaded.processor.num_image_tokens == loaded.model.tower_features(PIXELS).shape[1] == num_tokens


@pytest.mark.parametrize("name", TOWERS)
def test_another_input_size_interpolates_the_position_table(name: str) -> None:
    loaded = tiny_llava("linear", name, image_size=56, build_size=28)
    assert loaded.processor.image_size == (28, 28)
    features = loaded.model.tower_features(PIXELS)
    assert features.shape[1] == loaded.processor.num_image_tokens == 4
    changed = tiny_llava("linear", name, image_size=28).model.tower_features(PIXELS)
    assert not torch.equal(features, changed)


def test_size_must_fit_the_patches(tmp_path: Path) -> None:
    tower = load_tower(str(write_tiny_tower(tmp_path)), torch.float32)
    with pytest.raises(ConfigError, match=r"30 is not a multiple of the tower's patch size 14"):
        tower_image_processor(str(tmp_path), tower.config, 30)


def test_vision_half_of_a_two_tower_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    whole = CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(vocab_size=32, **sizes).to_dict(),
            vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes).to_dict(),
            projection_dim=8,
        )
    ).eval()
    whole.save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path), torch.float32)
    with torch.no_grad():
        expected = whole.vision_model(PIXELS).last_hidden_state
        assert torch.equal(tower(PIXELS).last_hidden_state, expected)
    assert not tower.training


def test_missing_weights_are_not_initialized_randomly(tmp_path: Path) -> None:
    file = write_tiny_tower(tmp_path) / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "layers.1" in name and "fc1.weight" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights .*fc1") as caught:
        load_tower(str(tmp_path), torch.float32)
    assert "\n" not in str(caught.value)


def test_a_language_model_is_not_a_tower(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a vision tower; expected CLIP"):
        load_tower(str(write_tiny_lm(tmp_path)), torch.float32)


def test_nothing_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        load_tower(str(tmp_path / "nowhere"), torch.float32)
    assert "\n" not in str(caught.value)


DEFAULTS = {
    "clip": (CLIPImageProcessorPil, 0.48145466),
    "siglip": (SiglipImageProcessorPil, 0.5),
    "dinov2": (BitImageProcessorPil, 0.485),
    "vit": (ViTImageProcessorPil, 0.485),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_without_processor_file_gets_its_familys(tmp_path: Path, name: str) -> None:
    write_tiny_tower(tmp_path, name)
    (tmp_path / "preprocessor_config.json").unlink()
    tower = load_tower(str(tmp_path), torch.float32)
    processor = tower_image_processor(str(tmp_path), tower.config, None)
    expected_class, first_mean = DEFAULTS[name]
    assert type(processor) is expected_class
    assert next(iter(processor.image_mean)) == first_mean
    assert input_size(processor) == 28
    assert num_patches(processor, tower.config) == 4


def test_own_processor_file_is_used(tmp_path: Path) -> None:
    write_tiny_tower(tmp_path, "dinov2")
    CLIPImageProcessorPil(
        image_mean=[0.1, 0.2, 0.3], size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path), torch.float32)
    processor = tower_image_processor(str(tmp_path), tower.config, None)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]


def test_broken_processor_file(tmp_path: Path) -> None:
    write_tiny_tower(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    tower = load_tower(str(tmp_path), torch.float32)
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        tower_image_processor(str(tmp_path), tower.config, None)


class Planted:
    """Ends the process when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('os')._exit(7)",)


def damage(file: Path, kind: str) -> None:
    """Turn weights into a hostile or damaged file."""
    content = file.read_bytes()
    if kind == "code":
        torch.save({"vision_model.embeddings.class_embedding": Planted()}, file)
    elif kind == "legacy code":
        torch.save({"a": Planted()}, file, _use_new_zipfile_serialization=False)
    elif kind == "nested":
        write_archive(file, table((b")" + b"\x85" * 300_000, tensor((4,), (1,)))))
    elif kind == "countless":
        write_archive(file, b"\x80\x02" + b"N" * 1_100_000 + b".", compression=zipfile.ZIP_DEFLATED)
    elif kind == "longer than its storage":
        write_archive(file, table(("a", tensor((2**40,), (0,)))))
    elif kind == "another kind":
        torch.save([1, 2, 3], file)
    else:
        file.write_bytes({"empty": b"", "truncated": content[:-200], "half": content[: len(content) // 2]}[kind])


@pytest.mark.parametrize("name", ["clip", "dinov2"])
@pytest.mark.parametrize(
    "kind",
    [
        *("code", "legacy code", "nested", "countless", "longer than its storage", "another kind"),
        *("empty", "truncated", "half"),
    ],
)
def test_a_hostile_bin_file_of_a_tower_is_one_line(tmp_path: Path, name: str, kind: str) -> None:
    folder = write_tiny_tower(tmp_path / "tower", name)
    weights = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), weights)
    (folder / "model.safetensors").unlink()
    load_tower(str(folder), torch.float32)
    damage(weights, kind)
    with pytest.raises(CheckpointError) as caught:
        load_tower(str(folder), torch.float32)
    text = str(caught.value)
    assert text.isprintable() and str(folder) in text and len(text) < 600
    assert "weights_only" not in text and "Unpickl" not in text
