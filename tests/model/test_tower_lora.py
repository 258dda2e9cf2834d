"""LoRA in the vision tower: adapted blocks, gradients, its own settings, saving, and weights to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llava.errors import CheckpointError, ConfigError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.lora import add_lora, freeze_for, trainable_report
from llava.model.tower_lora import TowerLora, tower_linear_layers
from tests.support.model_tools import batch, logits, shake, trained
from tests.support.tiny import tiny_llava

SMALL = TowerLora(r=2, alpha=6, dropout=0.0)


def adapted(loaded: LoadedModel, *, language: bool = True, tower: TowerLora = SMALL, **flags: bool) -> nn.Module:
    network = add_lora(loaded, r=4, alpha=8, dropout=0.0, language=language, tower=tower)
    freeze_for(network, has_adapter=language, freeze_tower_adapter=tower.frozen, **flags)
    return network


def of_tower(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of the tower's adapter."""
    return {n: p for n, p in network.named_parameters() if "vision_tower." in n and "lora_" in n}


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2", "vit"])
def test_all_linear_layers_below_the_selected_one_are_adapted(tower: str) -> None:
    loaded = tiny_llava(tower=tower)
    blocks = next(m for m in loaded.model.model.vision_tower.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    below = [module for block in list(blocks)[:2] for module in block.modules() if isinstance(module, nn.Linear)]
    network = adapted(loaded)
    layers = [m for n, m in network.named_modules() if isinstance(m, LoraLayer) and "vision_tower." in n]
    assert [layer.get_base_layer() for layer in layers] == below and len(below) >= 12
    assert {layer.r["default"] for layer in layers} == {2} and {layer.scaling["default"] for layer in layers} == {3.0}
    others = [m for n, m in network.named_modules() if isinstance(m, LoraLayer) and "vision_tower." not in n]
    assert {layer.r["default"] for layer in others} == {4}


def test_adapters_have_gradient_and_nothing_else_of_the_tower(tiny: LoadedModel) -> None:
    network = adapted(tiny)
    shake(of_tower(network))  # the second matrix of a new adapter is zero, and so is the gradient of the first
    network(**batch(tiny)).loss.backward()
    tower = {n: p for n, p in network.named_parameters() if "vision_tower." in n}
    assert all(p.grad is not None and bool(p.grad.any()) for p in of_tower(network).values())
    assert not any(p.requires_grad or p.grad is not None for n, p in tower.items() if "lora_" not in n)


def test_gradients_are_equal_with_checkpointing() -> None:
    found: list[dict[str, Tensor]] = []
    for checkpoints in (False, True):
        loaded = tiny_llava()
        torch.manual_seed(0)
        network = adapted(loaded)
        shake(trained(network))
        if checkpoints:
            loaded.model.enable_input_require_grads()
            loaded.model.activation_checkpointing_enable()
        network.train()
        network(**batch(loaded)).loss.backward()
        found.append({n: p.grad for n, p in of_tower(network).items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 24
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_bias_settings_do_not_open_the_tower(tiny: LoadedModel) -> None:
    network = add_lora(tiny, r=2, bias="all", tower=SMALL)
    freeze_for(network, has_adapter=True)
    opened = [n for n, p in network.named_parameters() if p.requires_grad and "vision_tower." in n]
    assert opened and all("lora_" in name for name in opened)


def test_the_published_adapter_trains_nothing(tiny: LoadedModel) -> None:
    network = adapted(tiny, tower=TowerLora(r=2, alpha=6, frozen=True))
    weights = of_tower(network)
    assert len(weights) == 36 and not any(p.requires_grad for p in weights.values())


def test_an_adapter_of_the_tower_beside_other_trained_parts(tiny: LoadedModel) -> None:
    network = adapted(tiny, language=False, projector_only=True)
    kinds = {n for n, p in network.named_parameters() if p.requires_grad}
    assert kinds == {*of_tower(network), *(n for n in kinds if "multi_modal_projector." in n)}
    assert "tower adapter" in trainable_report(network)


def test_dropout_of_the_tower_is_its_own(tiny: LoadedModel) -> None:
    network = add_lora(tiny, r=2, dropout=0.05, tower=TowerLora(r=2, dropout=0.2))
    found = {
        "vision_tower." in name: module.lora_dropout["default"].p
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert found == {True: 0.2, False: 0.05}


def test_a_tower_without_a_block_below_the_layer_is_refused() -> None:
    loaded = tiny_llava(select_layer=0)
    with pytest.raises(ConfigError, match="no linear layers below hidden state 0"):
        tower_linear_layers(loaded.model)


@pytest.mark.parametrize("language", [True, False])
def test_saved_loaded_merged(tmp_path: Path, built: LoadedModel, language: bool) -> None:
    network = adapted(built, language=language)
    shake(trained(network))
    network.eval()
    expected = logits(built)
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert list(config["rank_pattern"].values()) == [2] and list(config["alpha_pattern"].values()) == [6]
    for merge in (True, False):
        again = load_checkpoint(tmp_path / "adapter", merge=merge)
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)


def test_exported_to_the_published_layout_and_back(tmp_path: Path, built: LoadedModel) -> None:
    network = adapted(built)
    shake(trained(network))
    network.eval()
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    convert_checkpoint(tmp_path / "adapter", tmp_path / "legacy", "legacy")
    inner = Checkpoint.open(tmp_path / "legacy" / "Vit-lora")
    assert inner.kind == "tower_adapter" and len(inner.tensors) == 24
    assert (inner.adapter["r"], inner.adapter["lora_alpha"]) == (2, 6)
    assert set(inner.adapter["target_modules"]) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    main = Checkpoint.open(tmp_path / "legacy").adapter
    assert (main["r"], main["lora_alpha"]) == (4, 8) and "fc1" not in main["target_modules"]
    again = load_checkpoint(tmp_path / "legacy", base=str(tmp_path / "parts" / "lm"))
    torch.testing.assert_close(logits(again), logits(built), rtol=0, atol=1e-5)


def test_exported_for_plain_peft(tmp_path: Path, built: LoadedModel) -> None:
    network = adapted(built)
    shake(trained(network))
    network.eval()
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    convert_checkpoint(tmp_path / "adapter", tmp_path / "out", "peft")
    base: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "base")
    inputs = {name: tensor for name, tensor in batch(built).items() if name != "labels"}
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()(**inputs).logits
    torch.testing.assert_close(found, logits(built), rtol=0, atol=1e-5)


def test_an_adapter_of_the_tower_alone_is_no_legacy_adapter(tmp_path: Path, built: LoadedModel) -> None:
    network: Any = adapted(built, language=False, projector_only=True)
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    with pytest.raises(CheckpointError, match="adapts the vision tower only"):
        convert_checkpoint(tmp_path / "adapter", tmp_path / "legacy", "legacy")


@pytest.fixture
def start(tmp_path: Path, built: LoadedModel) -> tuple[Path, dict[str, Tensor]]:
    """A folder with a trained `Vit-lora/`, and its weights by the name of our parameters."""
    network: Any = adapted(built)
    shake(trained(network))
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    convert_checkpoint(tmp_path / "adapter", tmp_path / "legacy", "legacy")
    return tmp_path / "legacy", {name: p.detach().clone() for name, p in of_tower(network).items()}


@pytest.mark.parametrize("place", [".", "Vit-lora", "Vit-lora/adapter_model.bin"])
def test_an_adapter_starts_from_earlier_weights(start: tuple[Path, dict[str, Tensor]], place: str) -> None:
    folder, weights = start
    network = adapted(tiny_llava(), tower=TowerLora(r=2, alpha=6, weights=str(folder / place)))
    found = of_tower(network)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_what_an_adapter_cannot_start_from(start: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = start
    for tower, match in (
        (TowerLora(r=4, alpha=6, weights=str(folder)), "--lora-r-vit 2, --lora-alpha-vit 6, this run --lora-r-vit 4"),
        (TowerLora(r=2, alpha=6, frozen=True, weights=str(folder)), r"lacks 6 layers .*layers\.2\."),
        (TowerLora(r=2, alpha=6, weights=str(tmp_path / "none")), "no such file or folder"),
        (TowerLora(r=2, alpha=6, weights=str(tmp_path / "adapter")), "expected a LoRA adapter of a vision tower"),
    ):
        with pytest.raises(CheckpointError, match=match):
            adapted(tiny_llava(), tower=tower)
