"""open_clip towers: recorded outputs, timm's forward in plain torch, names both ways, files, preprocessing, errors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from llava.errors import CheckpointError, ConfigError
from llava.imaging.image_processor import OpenClipImageProcessorPil, load_image_processor
from llava.model.builder import build_model
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model
from llava.model.multimodal_encoder.open_clip_encoder import convert, loading, trunks
from llava.model.multimodal_encoder.open_clip_encoder.trunks import (
    TRUNKS,
    Trunk,
    name_pairs,
    to_open_clip,
    trunk_config,
)
from llava.model.multimodal_encoder.towers import load_tower, num_patches, tower_image_processor
from tests.support.tiny import tiny_image, write_tiny_lm

SMALL = {"scaled": Trunk(14, 32, 3, 4, layer_scale=True), "plain": Trunk(14, 32, 3, 4, layer_scale=False)}
"""Trunks of the two published types, with 2 x 2 patches at 28 pixels."""


@pytest.fixture(autouse=True)
def small_trunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, trunk in SMALL.items():
        monkeypatch.setitem(TRUNKS, name, trunk)
    monkeypatch.delenv(loading.WEIGHTS_VARIABLE, raising=False)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repository: str, name: str) -> Path:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(loading, "_download", unreachable)


def timm_weights(trunk: Trunk, *, size: int = 28, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights under timm's names."""
    draw = torch.Generator().manual_seed(seed)
    width, positions = trunk.width, (size // trunk.patch) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions, width),
        "patch_embed.proj.weight": (width, 3, trunk.patch, trunk.patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
    }
    if trunk.layer_scale:
        block |= {"ls1.gamma": (width,), "ls2.gamma": (width,)}
    for layer in range(trunk.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return {name: torch.randn(shape, generator=draw) * 0.2 for name, shape in shapes.items()}


def timm_states(weights: dict[str, Tensor], trunk: Trunk, pixels: Tensor) -> list[Tensor]:
    """Return hidden states computed as in timm: embedded patches, then the output of every block."""
    patches = F.conv2d(pixels, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=trunk.patch)
    tokens = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat([weights["cls_token"].expand(len(tokens), -1, -1), tokens], dim=1) + weights["pos_embed"]
    states = [tokens]
    for layer in range(trunk.num_layers):
        part = {n.removeprefix(f"blocks.{layer}."): w for n, w in weights.items() if n.startswith(f"blocks.{layer}.")}
        x = F.layer_norm(tokens, (trunk.width,), part["norm1.weight"], part["norm1.bias"], 1e-6)
        fused = F.linear(x, part["attn.qkv.weight"], part["attn.qkv.bias"])
        batch, length, _ = x.shape
        query, key, value = fused.reshape(batch, length, 3, trunk.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-2, -1)) * (trunk.width // trunk.num_heads) ** -0.5
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, length, -1)
        mixed = F.linear(mixed, part["attn.proj.weight"], part["attn.proj.bias"])
        tokens = tokens + mixed * part.get("ls1.gamma", 1.0)
        x = F.layer_norm(tokens, (trunk.width,), part["norm2.weight"], part["norm2.bias"], 1e-6)
        x = F.gelu(F.linear(x, part["mlp.fc1.weight"], part["mlp.fc1.bias"]))
        x = F.linear(x, part["mlp.fc2.weight"], part["mlp.fc2.bias"])
        tokens = tokens + x * part.get("ls2.gamma", 1.0)
        states.append(tokens)
    return states


def model_config(name: str, size: int = 28) -> dict[str, Any]:
    vision = {"timm_model_name": f"{name}.some_tag", "timm_pool": "", "image_size": size}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"proj": "mlp", "pooler_type": "cls_pooler"}}


def training_checkpoint(trunk: dict[str, Tensor]) -> dict[str, Any]:
    """Return what open_clip's training writes: all weights under a parallel prefix, and the optimizer."""
    state = {f"module.visual.trunk.{name}": tensor for name, tensor in trunk.items()}
    dead = {
        "module.visual.head.proj.weight": torch.zeros(16, 32),
        "module.text.transformer.embeddings.position_ids": torch.arange(8),
        "module.logit_scale": torch.zeros(()),
    }
    return {"epoch": 3, "name": "run", "state_dict": state | dead, "optimizer": {"state": {}, "param_groups": [{}]}}


def write_tower(folder: Path, name: str, *, size: int = 28, table_size: int | None = None) -> dict[str, str]:
    """Write both files of a tower; return them as keyword arguments of `load_tower`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model_config(name, size)))
    weights = timm_weights(SMALL[name], size=table_size or size)
    torch.save(training_checkpoint(weights), folder / "weights.pt")
    return {"config_file": str(folder / "config.json"), "checkpoint": str(folder / "weights.pt")}


def test_the_recorded_tower(shared: Path) -> None:
    folder = shared / "oracles" / "llava-rad"
    given = {
        "config_file": str(folder / "biomedclipcxr_tiny.json"),
        "checkpoint": str(folder / "biomedclipcxr_tiny.pt"),
    }
    tower = load_tower("biomedclipcxr_tiny", torch.float32, **given)
    processor = tower_image_processor("biomedclipcxr_tiny", tower.config, None, **given)
    assert num_patches(processor, tower.config) == 16
    recorded, preprocessed = np.load(folder / "tower.npz"), np.load(folder / "image_preprocess.npz")
    for row, name in enumerate(recorded["names"]):
        with Image.open(folder / "images" / name) as image:
            pixels = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels[0], torch.from_numpy(preprocessed[name]), rtol=0, atol=1e-6)
        with torch.no_grad():
            states = tower(pixels, output_hidden_states=True).hidden_states
        for layer, expected in enumerate(recorded["hidden_states"]):
            torch.testing.assert_close(states[layer][0], torch.from_numpy(expected[row]), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            states[-2][0, 1:], torch.from_numpy(recorded["selected_patch"][row]), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", SMALL)
def test_hidden_states_are_those_of_timms_forward(tmp_path: Path, name: str) -> None:
    tower = load_tower("any name", torch.float32, **write_tower(tmp_path, name))
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
    expected = timm_states(timm_weights(SMALL[name]), SMALL[name], pixels)
    assert len(states) == len(expected) == SMALL[name].num_layers + 1
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not tower.training


@pytest.mark.parametrize("name", SMALL)
def test_names_there_and_back(tmp_path: Path, name: str) -> None:
    tower = load_tower("any", torch.float32, **write_tower(tmp_path, name))
    back = to_open_clip(tower.state_dict(), tower.config.model_type, SMALL[name].num_layers)
    weights = timm_weights(SMALL[name])
    assert set(back) == {f"visual.trunk.{key}" for key in weights}
    for key, tensor in weights.items():
        assert torch.equal(back[f"visual.trunk.{key}"], tensor), key


@pytest.mark.parametrize(
    ("file", "model_type", "patches", "num_names", "num_values"),
    [("biomedclip_cxr_518.json", "dinov2", 1369, 174, 86_579_712), ("biomedclip.json", "vit", 196, 150, 85_798_656)],
)
def test_published_towers(file: str, model_type: str, patches: int, num_names: int, num_values: int) -> None:
    content = json.loads((loading.MODEL_CONFIGS / file).read_text())
    config = trunk_config(content)
    assert config.model_type == model_type
    assert num_patches(trunks.open_clip_image_processor(content, {}), config) == patches
    assert len(list(name_pairs(model_type, config.num_hidden_layers))) == num_names
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("pooler.")) == num_values


def test_the_center_crop_is_that_of_open_clip() -> None:
    processor = OpenClipImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        do_normalize=False,
        do_rescale=False,
    )
    for rest, expected in [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)]:
        columns = np.tile(np.arange(28 + rest, dtype=np.uint8), (28, 1))
        image = Image.fromarray(np.stack([columns] * 3, axis=-1))
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        assert int(pixels[0, 0, 0, 0]) == expected, rest


def test_a_model_around_the_tower_is_saved_and_found_again(tmp_path: Path) -> None:
    given = write_tower(tmp_path / "tower", "scaled")
    lm = write_tiny_lm(tmp_path / "lm")
    loaded = build_model(
        str(lm), "my_tower", vision_tower_config=given["config_file"], vision_tower_checkpoint=given["checkpoint"]
    )
    image = tiny_image(0, 41).resize((41, 28))
    pixels = loaded.processor.pixels([image])
    features = loaded.model.tower_features(pixels)
    states = timm_states(timm_weights(SMALL["scaled"]), SMALL["scaled"], pixels)
    torch.testing.assert_close(features, states[-2][:, 1:], rtol=0, atol=1e-5)
    save_model(loaded.model, loaded.processor, tmp_path / "saved", origin=loaded.origin)
    again = load_checkpoint(tmp_path / "saved")
    assert type(again.processor.image_processor) is OpenClipImageProcessorPil
    assert torch.equal(again.processor.pixels([image]), pixels)
    assert torch.equal(again.model.tower_features(pixels), features)


def test_folder_of_the_hub_format(tmp_path: Path) -> None:
    weights = {f"visual.trunk.{name}": tensor for name, tensor in timm_weights(SMALL["plain"]).items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    content = {"model_cfg": model_config("plain"), "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        tower = load_tower(name, torch.float32)
        processor = tower_image_processor(name, tower.config, None)
        assert list(processor.image_mean) == preprocess["mean"]
        assert list(processor.image_std) == preprocess["std"]
        assert torch.equal(tower.layernorm.weight, weights["visual.trunk.norm.weight"])


def test_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, name: str) -> Path:
        if not (tmp_path / repository / name).is_file():
            raise FileNotFoundError(name)
        return tmp_path / repository / name

    monkeypatch.setattr(loading, "_download", download)
    folder = tmp_path / "owner" / "tower"
    given = write_tower(folder, "plain")
    Path(given["config_file"]).rename(folder / "open_clip_config.json")
    Path(given["checkpoint"]).rename(folder / "open_clip_pytorch_model.bin")
    assert load_tower("hf-hub:owner/tower", torch.float32).config.hidden_size == 32
    with pytest.raises(CheckpointError, match=r"hub repository owner/other has none of open_clip_config\.json"):
        load_tower("hf-hub:owner/other", torch.float32)


def test_a_name_does_not_change_behavior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = write_tower(tmp_path / "files", "plain")
    (tmp_path / "biomedclip_cxr_518").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_tower("biomedclip_cxr_518", torch.float32, **given).config.model_type == "vit"


def test_the_built_in_configuration_is_found_under_both_spellings(tmp_path: Path) -> None:
    for name in ("somewhere/model_configs/biomedclip_cxr_518.json", "biomedclipcxr_518.json"):
        assert loading.find_config(name) == loading.MODEL_CONFIGS / "biomedclip_cxr_518.json"
    with pytest.raises(CheckpointError, match=r"no open_clip model configuration other.json.*biomedclip.json"):
        loading.find_config("other.json")


def test_where_weights_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None) -> None:
    name = "biomedclipcxr_518_checkpoint.pt"
    with pytest.raises(CheckpointError, match=r"tried: .*beside.*LLAVA_WEIGHTS \(not set\).*microsoft/llava-rad"):
        loading.find_checkpoint(name, folders=[tmp_path / "beside"])
    monkeypatch.setenv(loading.WEIGHTS_VARIABLE, str(tmp_path / "local"))
    for folder in ("local", "beside", "."):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(b"")
        found = loading.find_checkpoint(str(tmp_path / name) if folder == "." else name, folders=[tmp_path / "beside"])
        assert found == tmp_path / folder / name


def test_a_table_of_another_size_is_resampled(tmp_path: Path) -> None:
    tower = load_tower("any", torch.float32, **write_tower(tmp_path, "plain", size=42, table_size=28))
    table = tower.embeddings.position_embeddings
    original = timm_weights(SMALL["plain"])["pos_embed"]
    assert table.shape == (1, 10, 32)
    assert torch.equal(table[:, 0], original[:, 0])
    # A 2 x 2 grid resampled to 3 x 3 keeps the order of its corners, and its center is the mean.
    torch.testing.assert_close(table[0, 5], original[0, 1:].mean(dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_the_trunk_as_a_folder_of_transformers(tmp_path: Path, name: str) -> None:
    given = write_tower(tmp_path / "open_clip", name)
    words = ["--vision_tower_config", given["config_file"], "--vision_tower_checkpoint", given["checkpoint"]]
    convert.main([*words, "--out", str(tmp_path / "plain")])
    one, other = load_tower("any", torch.float32, **given), load_tower(str(tmp_path / "plain"), torch.float32)
    assert type(one) is type(other)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in one.state_dict().items())
    processor = tower_image_processor(str(tmp_path / "plain"), other.config, None)
    assert type(processor) is OpenClipImageProcessorPil
    assert not any(file.name.startswith(".") for file in (tmp_path / "plain").iterdir())
    with pytest.raises(ConfigError, match="unknown dtype"):
        convert.main([*words, "--out", str(tmp_path / "other"), "--dtype", "int8"])
    assert not (tmp_path / "other").exists()


def broken(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    changed = dict(weights)
    if how == "missing":
        del changed["blocks.1.mlp.fc1.weight"]
    elif how == "left over":
        changed["blocks.3.norm1.weight"] = torch.zeros(32)
    else:
        changed["norm.weight"] = torch.zeros(8)
    return changed


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 weights differ.*layers.1.mlp.fc1.weight is missing"),
        ("left over", r"1 weights differ.*blocks.3.norm1.weight is not known"),
        ("shape", r"1 weights differ.*layernorm.weight is \(8,\), expected \(32,\)"),
    ],
)
def test_weights_must_fit_exactly(tmp_path: Path, how: str, message: str) -> None:
    given = write_tower(tmp_path, "plain")
    torch.save(training_checkpoint(broken(timm_weights(SMALL["plain"]), how)), given["checkpoint"])
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tower("any", torch.float32, **given)
    assert "\n" not in str(caught.value)


class Code:
    """Object that writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_broken_and_unsafe_files(tmp_path: Path) -> None:
    given = write_tower(tmp_path, "plain")
    weights = Path(given["checkpoint"])
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tower("any", torch.float32, **given)
    weights.write_bytes(pickle.dumps({"state_dict": {"visual.trunk.norm.weight": Code(tmp_path / "ran")}}))
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_tower("any", torch.float32, **given)
    assert not (tmp_path / "ran").exists()
    torch.save({"transformer.weight": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match=r"has no vision trunk .*found transformer.weight"):
        load_tower("any", torch.float32, **given)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            {"vision_cfg": {"timm_model_name": "resnet50", "image_size": 28}},
            ConfigError,
            "unknown timm trunk 'resnet50'",
        ),
        ({"vision_cfg": {"layers": 12, "width": 768}}, CheckpointError, r"timm_model_name; found keys \['layers'"),
        ({"vision_cfg": {"timm_model_name": "plain", "image_size": 30}}, CheckpointError, "multiple of 14 pixels"),
    ],
)
def test_unusable_configurations(content: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trunk_config(content)


def test_one_file_alone_is_rejected(tmp_path: Path) -> None:
    given = write_tower(tmp_path, "plain")
    with pytest.raises(ConfigError, match="needs two files"):
        load_tower("any", torch.float32, config_file=given["config_file"])


def test_another_resize_mode_is_rejected() -> None:
    with pytest.raises(ConfigError, match="squash"):
        trunks.open_clip_image_processor(model_config("plain"), {"resize_mode": "squash"})


def test_processor_files_of_both_kinds(tmp_path: Path) -> None:
    trunks.open_clip_image_processor(model_config("plain"), {}).save_pretrained(tmp_path / "own")
    assert type(load_image_processor(tmp_path / "own")) is OpenClipImageProcessorPil
    with pytest.raises(OSError, match="preprocessor_config"):
        load_image_processor(tmp_path)
