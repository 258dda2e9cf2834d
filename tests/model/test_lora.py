"""Trained parts in each stage, the marker rows, and the table of trained parameters."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from llava.errors import ConfigError
from llava.model.builder import LoadedModel
from llava.model.lora import add_lora, freeze_for, language_linear_layers, train_marker_rows, trainable_report
from llava.train.optimizer import parameter_groups
from llava.train.specs import OptimizerSpec
from tests.support.model_tools import batch
from tests.support.tiny import tiny_llava


def trained_parts(model: nn.Module) -> set[str]:
    kinds = {"multi_modal_projector": "projector", "vision_tower": "tower", "lora_": "adapter", "": "language"}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {next(kind for key, kind in kinds.items() if key in name) for name in names}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"projector", "language"}),
        ({"projector_only": True}, {"projector"}),
        ({"projector_only": True, "train_tower": True}, {"projector"}),
        ({"freeze_backbone": True}, {"projector"}),
        ({"freeze_projector": True}, {"language"}),
        ({"train_tower": True}, {"projector", "tower", "language"}),
        ({"train_tower": True, "freeze_backbone": True, "freeze_projector": True}, {"tower"}),
    ],
)
def test_stages(tiny: LoadedModel, flags: dict[str, bool], expected: set[str]) -> None:
    freeze_for(tiny.model, **flags)
    assert trained_parts(tiny.model) == expected
    # Unfrozen parameters get gradients, frozen ones do not.
    tiny.model(**batch(tiny)).loss.backward()
    moved = {name for name, parameter in tiny.model.named_parameters() if parameter.grad is not None}
    opened = {name for name, parameter in tiny.model.named_parameters() if parameter.requires_grad}
    assert moved <= opened
    after_layer = re.compile(r"vision_tower\.(.*layers\.2\.|post_layernorm)")  # layer -2 is the last one used
    assert all(after_layer.search(name) for name in opened - moved)


def test_stages_with_an_adapter(tiny: LoadedModel) -> None:
    network = add_lora(tiny, r=4, alpha=8)
    freeze_for(network, has_adapter=True)
    assert trained_parts(network) == {"projector", "adapter"}
    freeze_for(network, has_adapter=True, freeze_projector=True)
    assert trained_parts(network) == {"adapter"}


def test_biases_that_the_adapter_unfreezes_still_train() -> None:
    network = add_lora(tiny_llava(lm="qwen2"), bias="lora_only")
    freeze_for(network, has_adapter=True)
    opened = {name for name, p in network.named_parameters() if p.requires_grad and "lora_" not in name}
    biases = {name for name in opened if name.endswith("q_proj.base_layer.bias")}
    assert len(biases) == 2
    assert all("language_model" in name for name in opened if "multi_modal_projector" not in name)


def test_nothing_to_train_is_an_error(tiny: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="nothing would train"):
        freeze_for(tiny.model, projector_only=True, freeze_projector=True)


@pytest.mark.parametrize("lm", ["llama", "mistral", "qwen2"])
def test_adapter_sits_on_every_linear_layer_of_the_language_model_only(lm: str) -> None:
    loaded = tiny_llava(lm=lm)
    expected = {
        name
        for name, module in loaded.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.language_model.")
    }
    network = add_lora(loaded, r=4)
    adapted = {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name, _ in network.named_parameters()
        if ".lora_A" in name
    }
    assert adapted == expected
    assert len(adapted) == 2 * 7


def test_a_head_inside_the_language_model_has_no_adapter() -> None:
    layer = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("q_proj", "v_proj")})
    inside = nn.ModuleDict({"layers": nn.ModuleList([layer]), "lm_head": nn.Linear(2, 2)})
    network = nn.ModuleDict({"language_model": inside, "lm_head": nn.Linear(2, 2)})
    pattern = language_linear_layers(network)
    assert isinstance(pattern, str)
    found = {name for name, _ in network.named_modules() if re.fullmatch(pattern, name)}
    assert found == {f"language_model.layers.0.{name}" for name in ("q_proj", "v_proj")}


def test_other_targets(tiny: LoadedModel) -> None:
    network = add_lora(tiny, r=2, target=r".*language_model\.layers\.1\..*q_proj")
    assert sum(".lora_A" in name for name, _ in network.named_parameters()) == 1


@pytest.mark.parametrize(("settings", "message"), [({"target": "no_such_layer"}, "cannot be added"), ({"r": 0}, "r=0")])
def test_settings_that_peft_rejects(tiny: LoadedModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_lora(tiny, **settings)


@pytest.mark.parametrize("tie", [False, True])
def test_only_the_marker_rows_move(tie: bool) -> None:
    loaded = tiny_llava(tie=tie, use_im_start_end=True)
    model, markers = loaded.model, loaded.model.config.marker_token_ids
    freeze_for(model, projector_only=True)
    train_marker_rows(model, markers)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    spec = OptimizerSpec(0.01, 0.01, 0.01, weight_decay=0.5)
    decaying = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(parameter_groups(model, decaying, spec), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch(loaded)).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name == "model.language_model.embed_tokens.weight":
            others = [row for row in range(parameter.shape[0]) if row not in markers]
            assert torch.equal(parameter[others], before[name][others])
            assert not torch.isclose(parameter[markers], before[name][markers]).all(dim=1).any()
        else:
            assert torch.equal(parameter, before[name]) != ("multi_modal_projector" in name), name
    # Tied: the output role changes too, and its gradient counts.
    head = model.get_output_embeddings().weight
    assert torch.equal(head[markers], model.get_input_embeddings().weight[markers]) == tie


def test_tied_marker_rows_get_the_gradient_of_both_roles() -> None:
    loaded = tiny_llava(tie=True, use_im_start_end=True)
    model, markers = loaded.model, loaded.model.config.marker_token_ids
    inputs = batch(loaded)
    model(**inputs).loss.backward()
    expected = model.get_input_embeddings().weight.grad[markers].clone()
    model.zero_grad()
    freeze_for(model, projector_only=True)
    (table,) = train_marker_rows(model, markers)
    model(**inputs).loss.backward()
    torch.testing.assert_close(table.grad[markers], expected)
    assert int(table.grad.abs().sum(dim=1).count_nonzero()) == 2


@pytest.mark.parametrize("rows", [[], [100_000]])
def test_marker_rows_must_exist(tiny: LoadedModel, rows: list[int]) -> None:
    with pytest.raises(ConfigError, match="not in the vocabulary of 262 tokens"):
        train_marker_rows(tiny.model, rows)


def test_report_counts_what_trains() -> None:
    loaded = tiny_llava(use_im_start_end=True)
    freeze_for(loaded.model, projector_only=True)
    train_marker_rows(loaded.model, loaded.model.config.marker_token_ids)
    table = {line.split("  ")[0].strip(): line.split() for line in trainable_report(loaded.model).splitlines()[1:]}
    num_projector = sum(p.numel() for p in loaded.model.model.multi_modal_projector.parameters())
    total = sum(p.numel() for p in loaded.model.parameters())
    assert table["projector"][1:] == ["4", f"{num_projector:,}", f"{num_projector:,}", "100.00%"]
    assert table["language model"][-2] == str(2 * 32)
    assert table["vision tower"][-2:] == ["0", "0.00%"]
    assert table["total"][2:4] == [f"{total:,}", f"{num_projector + 64:,}"]


def test_a_frozen_tower_has_no_dropout() -> None:
    loaded = tiny_llava()
    freeze_for(loaded.model)
    loaded.model.train()
    assert loaded.model.model.language_model.training
    assert not any(module.training for module in loaded.model.model.vision_tower.modules())
    freeze_for(loaded.model, train_tower=True)
    loaded.model.train()
    assert all(module.training for module in loaded.model.model.vision_tower.modules())
    # Through a wrapper as well.
    network = add_lora(tiny_llava())
    network.train()
    assert not network.base_model.model.model.vision_tower.training
