"""Conversions keep changed towers, check scales and copies of tower adapters, and leave no partial folder."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import CheckpointError
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model
from llava.model.checkpoint.tools.convert import WRITERS, convert_checkpoint, to_model
from llava.model.checkpoint.tools.merge_lora import merge_lora
from llava.utils.folders import new_folder
from tests.support.legacy_folders import write_legacy, write_lora

LAYER = "model.vision_tower.encoder.layers.0.mlp.fc1"


def weight(folder: Path) -> torch.Tensor:
    return load_checkpoint(folder).model.state_dict()[f"{LAYER}.weight"]


@pytest.mark.parametrize("ways", [["legacy"], ["model", "legacy"], ["hf", "legacy"], ["ours", "legacy"]])
def test_a_tower_with_a_merged_adapter_is_written_into_the_legacy_folder(tmp_path: Path, ways: list[str]) -> None:
    folder, options = write_lora(tmp_path, tower_adapter=True), LoadOptions(base=str(tmp_path / "lm"))
    expected = load_checkpoint(folder, base=str(tmp_path / "lm")).model.state_dict()[f"{LAYER}.weight"]
    for way in ways:
        convert_checkpoint(folder, tmp_path / f"as {way}", way, options)
        folder, options = tmp_path / f"as {way}", LoadOptions()
    if ways[0] == "ours":  # an adapter again, with the tower's own inside
        assert Checkpoint.open(folder).tower_adapter is not None
        return
    assert Checkpoint.open(folder).has_tower
    assert json.loads((folder / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    assert torch.equal(weight(folder), expected)


@pytest.mark.parametrize("is_trained", [True, False])
def test_an_external_tower_is_written_if_it_was_trained(tmp_path: Path, is_trained: bool) -> None:
    convert_checkpoint(write_legacy(tmp_path, tower_inside=False), tmp_path / "ours", "ours")
    loaded = load_checkpoint(tmp_path / "ours")
    if is_trained:
        loaded.model.state_dict()[f"{LAYER}.weight"].add_(1)
    save_model(loaded.model, loaded.processor, tmp_path / "trained", origin=loaded.origin)
    convert_checkpoint(tmp_path / "trained", tmp_path / "legacy", "legacy")
    assert Checkpoint.open(tmp_path / "legacy").has_tower is is_trained
    assert torch.equal(weight(tmp_path / "legacy"), weight(tmp_path / "trained"))


def change_settings(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize("settings", [{"r": 8}, {"r": 0}, {"r": None}, {"r": "4"}, {"lora_alpha": None}])
def test_a_scale_that_does_not_fit_the_matrices_is_rejected(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_lora(tmp_path)
    change_settings(folder, **settings)
    with pytest.raises(CheckpointError, match=r"expected"):
        load_checkpoint(folder, base=str(tmp_path / "lm"))


@pytest.mark.parametrize("does_something", [True, False])
def test_copies_of_a_tower_adapter_that_is_not_here(tmp_path: Path, does_something: bool) -> None:
    folder = write_lora(tmp_path)
    place = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    up = torch.full((64, 4), float(does_something))
    copies = {f"{place}.lora_A.weight": torch.ones(4, 32), f"{place}.lora_B.weight": up}
    save_file({**load_file(folder / "adapter_model.safetensors"), **copies}, folder / "adapter_model.safetensors")
    if not does_something:
        load_checkpoint(folder, base=str(tmp_path / "lm"))
        return
    with pytest.raises(CheckpointError, match=r"Vit-lora.*--lora-pretrain"):
        load_checkpoint(folder, base=str(tmp_path / "lm"))
    with pytest.raises(CheckpointError, match=r"Vit-lora.*--lora-pretrain"):
        merge_lora(folder, str(tmp_path / "lm"), tmp_path / "merged")


def test_a_merged_models_card_has_its_name(tmp_path: Path) -> None:
    convert_checkpoint(write_lora(tmp_path), tmp_path / "ours", "ours", LoadOptions(base=str(tmp_path / "lm")))
    merge_lora(tmp_path / "ours", None, tmp_path / "merged model")
    assert "# merged model\n" in (tmp_path / "merged model" / "README.md").read_text()


@pytest.fixture(params=[True, False])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Return an empty or missing folder, and check afterwards that it is unchanged."""
    folder = tmp_path / "new"
    if request.param:
        folder.mkdir()
    yield folder
    assert folder.is_dir() is request.param
    assert not folder.is_dir() or not list(folder.iterdir())


def test_a_conversion_on_a_full_disk_leaves_nothing(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(checkpoint: Any, options: Any, path: Path) -> None:
        to_model(checkpoint, options, path)
        (path / "inner").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write_legacy(tmp_path)
    monkeypatch.setitem(WRITERS, "model", full)
    with pytest.raises(CheckpointError, match=f"{target} cannot be written: the disk is full; free space and rerun"):
        convert_checkpoint(source, target, "model")


def test_a_delta_tool_on_a_full_disk_says_so_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="b cannot be written: the disk is full"),
        new_folder(tmp_path / "a" / "b"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
