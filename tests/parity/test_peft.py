"""LoRA against its formula and against peft's own merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.model.builder import LoadedModel
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter, save_model
from llava.model.lora import add_lora, freeze_for
from tests.support.legacy_folders import write_lora
from tests.support.model_tools import logits, shake, trained
from tests.support.tiny import tiny_llava, write_tiny_lm


def adapted(loaded: LoadedModel) -> torch.nn.Module:
    network = add_lora(loaded, r=4, alpha=12)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    return network.eval()


def test_merged_weights_are_the_formula(tmp_path: Path, built: LoadedModel) -> None:
    before = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    network = adapted(built)
    parts = {name.removeprefix("base_model.model."): p.detach() for name, p in network.named_parameters()}
    projector = {name: tensor for name, tensor in parts.items() if "multi_modal_projector" in name}
    save_adapter(network, built.processor, tmp_path, origin=built.origin)
    merged = load_checkpoint(tmp_path).model.state_dict()
    assert merged.keys() == before.keys()
    num_adapted = 0
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        expected = projector.get(name, weight)
        if f"{layer}.lora_A.default.weight" in parts:
            update = parts[f"{layer}.lora_B.default.weight"] @ parts[f"{layer}.lora_A.default.weight"]
            expected = weight + 12 / 4 * update
            num_adapted += 1
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)
    assert num_adapted == 2 * 7


def test_our_merge_is_pefts(tmp_path: Path, built: LoadedModel) -> None:
    network = adapted(built)
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    theirs = network.merge_and_unload().state_dict()
    ours = load_checkpoint(tmp_path / "adapter")
    assert all(torch.equal(ours.model.state_dict()[name], tensor) for name, tensor in theirs.items())
    save_model(ours.model, ours.processor, tmp_path / "merged")
    assert torch.equal(logits(load_checkpoint(tmp_path / "merged")), logits(ours))


def test_a_fresh_adapter_changes_nothing() -> None:
    loaded = tiny_llava()
    expected = logits(loaded)
    add_lora(loaded).eval()
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 8 / 4),
        ({"use_rslora": True}, 8 / 2),
        ({"use_rslora": False}, 8 / 4),
        ({"use_rslora": True, "lora_alpha": 3}, 3 / 2),
        ({"lora_alpha": 1}, 1 / 4),
        ({"use_rslora": True, "lora_alpha": 2.5}, 2.5 / 2),
    ],
)
def test_the_scale_of_a_legacy_adapter(tmp_path: Path, settings: dict[str, object], scale: float) -> None:
    """Rank-stabilized LoRA divides alpha by the root of the rank."""
    write_tiny_lm(tmp_path / "lm", "llama")
    folder = write_lora(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    before = load_file(tmp_path / "lm" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    after = load_checkpoint(folder, base=str(tmp_path / "lm")).model.model.language_model.layers[0].self_attn.q_proj
    parts = load_file(folder / "adapter_model.safetensors")
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    update = parts[f"{place}.lora_B.weight"] @ parts[f"{place}.lora_A.weight"]
    torch.testing.assert_close(after.weight, before + scale * update, rtol=0, atol=1e-6)
