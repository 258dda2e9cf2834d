"""Trained weights and learning rates, and saving and loading of each kind of run."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava.data.collator import Collator
from llava.data.dataset import SFTDataset
from llava.data.records import load_samples
from llava.model import lora
from llava.model.builder import LoadedModel
from llava.model.checkpoint.load import load_checkpoint
from llava.train.args import LlavaTrainingArguments
from llava.train.objectives.sft import SFT
from llava.train.optimizer import parameter_groups, part_of
from tests.support.runs import arguments, losses, saved, train, write_parts, write_uneven
from tests.support.tiny import tiny_llava


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("tied"), tie=True)


@pytest.mark.parametrize("tie", [False, True])
def test_stage_1_moves_projector_and_marker_rows(parts: Path, tied: Path, tmp_path: Path, tie: bool) -> None:
    """Other rows keep their values with weight decay, with momentum, and in a tied table."""
    folder = tied if tie else parts
    stage_1 = {"tune_mm_mlp_adapter": True, "mm_use_im_start_end": True, "weight_decay": 0.5, "num_train_epochs": 3}
    train(arguments(folder, tmp_path / "start", **stage_1, learning_rate=0.0))
    train(arguments(folder, tmp_path / "end", **stage_1, learning_rate=1e-2))
    before, after = load_checkpoint(tmp_path / "start"), load_checkpoint(tmp_path / "end")
    markers = before.model.config.marker_token_ids
    assert len(markers) == 2
    old = dict(before.model.named_parameters())
    for name, parameter in after.model.named_parameters():
        if "multi_modal_projector" in name:
            assert not torch.equal(parameter, old[name])
        elif name.endswith("embed_tokens.weight"):
            moved = (parameter != old[name]).any(dim=1).nonzero().flatten().tolist()
            assert moved == sorted(markers)
        else:
            assert torch.equal(parameter, old[name]), name
    tables = [after.model.get_input_embeddings().weight, after.model.get_output_embeddings().weight]
    assert torch.equal(*tables) is tie


def test_steps_without_an_image_move_the_projector_by_its_momentum(parts: Path, tmp_path: Path) -> None:
    """One process does what several do, whose gradients are zero then and not absent."""
    rows = json.loads((parts / "uneven.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([rows[0], rows[2], rows[5]]))
    options = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1, "save_strategy": "steps"}
    options |= {"save_steps": 1, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    options |= {"data_path": tmp_path / "rows.json", "image_folder": parts / "images"}
    train(arguments(parts, tmp_path / "run", **options))
    steps = [saved(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2, 3)]
    moved = [
        [not torch.equal(after[name], before[name]) for name in before if "multi_modal_projector" in name]
        for before, after in pairwise(steps)
    ]
    assert ["image" in rows[number] for number in (0, 2, 5)] == [True, False, False]
    assert moved == [[True, True]] * 2  # weight and bias


def groups_of(network: nn.Module, **options: Any) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of every trained parameter."""
    args = LlavaTrainingArguments(output_dir="unused", learning_rate=1e-3, weight_decay=0.1, **options)
    decaying = {name for name, _ in network.named_parameters() if not name.endswith("bias") and "norm" not in name}
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, decaying, args.optimizer_spec())
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_every_part_has_its_learning_rate(tiny: LoadedModel) -> None:
    lora.freeze_for(tiny.model, train_tower=True)
    found = groups_of(tiny.model, mm_projector_lr=2e-3, mm_vision_tower_lr=3e-3)
    rates = {"projector": 2e-3, "tower": 3e-3, "language": 1e-3}
    assert set(found) == {name for name, _ in tiny.model.named_parameters()}
    for name, (rate, decay) in found.items():
        assert rate == rates[part_of(name)]
        assert decay == (0.0 if name.endswith("bias") or "norm" in name else 0.1)


@pytest.mark.parametrize("given", [
    {"mm_projector_lr": 0.0},
    {"mm_vision_tower_lr": 0.0},
    {"vision_tower_lr": 0.0},
    {"mm_projector_lr": 0.0, "mm_vision_tower_lr": 0.0},
    {"mm_projector_lr": 0.0, "vision_tower_lr": 2e-3},
])  # fmt: skip
def test_a_learning_rate_of_zero_is_zero(tiny: LoadedModel, given: dict[str, float]) -> None:
    lora.freeze_for(tiny.model, train_tower=True)
    tower = given.get("vision_tower_lr", given.get("mm_vision_tower_lr", 1e-3))
    rates = {"projector": given.get("mm_projector_lr", 1e-3), "tower": tower, "language": 1e-3}
    assert all(rate == rates[part_of(name)] for name, (rate, _) in groups_of(tiny.model, **given).items())


def test_a_projector_with_rate_zero_keeps_its_weights(parts: Path, tmp_path: Path) -> None:
    for name, rate in (("zero", "0"), ("start", "0.0"), ("default", None)):
        words = {"mm_projector_lr": rate, "max_steps": 2 if name != "start" else 1, "weight_decay": 0.1}
        train(arguments(parts, tmp_path / name, **words))
    zero, start, default = (
        {key: tensor for key, tensor in saved(tmp_path / name).items() if "projector" in key}
        for name in ("zero", "start", "default")
    )
    assert zero and all(torch.equal(zero[key], start[key]) for key in zero)
    assert not all(torch.equal(zero[key], default[key]) for key in zero)


def test_frozen_parts_are_in_no_group(tiny: LoadedModel) -> None:
    lora.freeze_for(tiny.model)
    assert {part_of(name) for name in groups_of(tiny.model)} == {"projector", "language"}
    lora.freeze_for(tiny.model, projector_only=True)
    assert {part_of(name) for name in groups_of(tiny.model)} == {"projector"}


def test_the_marker_table_never_decays() -> None:
    loaded = tiny_llava(use_im_start_end=True)
    lora.freeze_for(loaded.model, projector_only=True)
    lora.train_marker_rows(loaded.model, loaded.model.config.marker_token_ids)
    found = groups_of(loaded.model)
    assert [decay for name, (_, decay) in found.items() if "embed_tokens" in name] == [0.0]


def answer_losses(loaded: LoadedModel, parts: Path) -> torch.Tensor:
    """Loss of each row under a model."""
    samples = load_samples(parts / "vqa" / "train.json")
    dataset = SFTDataset(samples, loaded.processor, image_folder=parts / "vqa" / "images", max_length=2048)
    collator = Collator(dataset, loaded.processor.image_token_id, loaded.processor.pad_token_id)
    loaded.model.eval()
    with torch.no_grad():
        steps = [collator([(row, dataset[row])]) for row in range(4)]
        return torch.stack([SFT()(loaded.model, step.rows[0], num_items=torch.ones(())).loss for step in steps])


def test_full_round_trip(parts: Path, tmp_path: Path) -> None:
    train(arguments(parts, tmp_path / "run", save_strategy="steps", save_steps=3))
    loaded = load_checkpoint(tmp_path / "run")
    state, written = loaded.model.state_dict(), saved(tmp_path / "run")
    assert all(any(torch.equal(tensor, other) for other in state.values()) for tensor in written.values())
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint-3").model.state_dict()
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in state.items())
    assert loaded.model.config.text_config.use_cache


def test_adapter_round_trip_and_merge(parts: Path, tmp_path: Path) -> None:
    train(arguments(parts, tmp_path, lora_enable=True, lora_r=4, num_train_epochs=2))
    apart, merged = load_checkpoint(tmp_path, merge=False), load_checkpoint(tmp_path)
    by_peft = load_checkpoint(tmp_path, merge=False)
    by_peft.model = by_peft.model.merge_and_unload()
    first, second = merged.model.state_dict(), by_peft.model.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    torch.testing.assert_close(answer_losses(apart, parts), answer_losses(merged, parts), atol=1e-4, rtol=1e-4)
    adapters = {name: tensor for name, tensor in apart.model.state_dict().items() if "lora_B" in name}
    assert adapters and all(tensor.any() for tensor in adapters.values())


def test_chain_of_stages(parts: Path, tmp_path: Path) -> None:
    """A projector, an adapter on it, and an adapter on that all load, with the weights of the earlier stages."""
    stage_1 = {"tune_mm_mlp_adapter": True, "mm_use_im_start_end": True, "learning_rate": 1e-2}
    train(arguments(parts, tmp_path / "1", **stage_1))
    adapter = {"lora_enable": True, "lora_r": 2, "vision_tower": None}
    train(arguments(parts, tmp_path / "2", **adapter, model_name_or_path=tmp_path / "1", freeze_mm_mlp_adapter=True))
    train(arguments(parts, tmp_path / "3", **adapter, model_name_or_path=tmp_path / "2", num_train_epochs=2))
    first, second, third = (load_checkpoint(tmp_path / name) for name in "123")
    projector = "model.multi_modal_projector.weight"
    assert torch.equal(first.model.state_dict()[projector], second.model.state_dict()[projector])
    rows = first.model.get_input_embeddings().weight[first.model.config.marker_token_ids]
    for later in (second, third):
        assert torch.equal(rows, later.model.get_input_embeddings().weight[first.model.config.marker_token_ids])
    found = [float(answer_losses(loaded, parts).sum()) for loaded in (first, second, third)]
    assert found[0] > found[1] > found[2]
    assert losses(tmp_path / "3")[0] < losses(tmp_path / "2")[0]


def test_a_projector_file_is_taken_over(parts: Path, tmp_path: Path) -> None:
    stage_1 = {"tune_mm_mlp_adapter": True, "learning_rate": 1e-2}
    train(arguments(parts, tmp_path / "1", **stage_1))
    file = tmp_path / "1" / "mm_projector.bin"
    train(arguments(parts, tmp_path / "2", pretrain_mm_mlp_adapter=file, freeze_mm_mlp_adapter=True))
    projector = torch.load(file, weights_only=True)["model.mm_projector.weight"]
    assert torch.equal(
        load_checkpoint(tmp_path / "2").model.state_dict()["model.multi_modal_projector.weight"], projector
    )


def test_an_unfrozen_tower_trains(parts: Path, tmp_path: Path) -> None:
    data = write_uneven(tmp_path)
    where = {"data_path": data, "image_folder": tmp_path / "images"}
    train(arguments(parts, tmp_path / "run", **where, unfreeze_mm_vision_tower=True))
    train(arguments(parts, tmp_path / "frozen", **where))
    moved, kept = saved(tmp_path / "run"), saved(tmp_path / "frozen")
    names = [name for name in kept if "vision_tower" in name and "layers.0" in name]
    assert names and not any(torch.equal(moved[name], kept[name]) for name in names if name.endswith("weight"))


def test_origin_says_what_a_projector_builds_on(parts: Path, tmp_path: Path) -> None:
    train(arguments(parts, tmp_path, tune_mm_mlp_adapter=True, version="vicuna_v1"))
    origin = json.loads((tmp_path / "llava_origin.json").read_text())
    assert origin["kind"] == "projector" and origin["build"]["lm"] == str((parts / "lm").resolve())
    assert load_checkpoint(tmp_path).processor.template.name == "vicuna_v1"
