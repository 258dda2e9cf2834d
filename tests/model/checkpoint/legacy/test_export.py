"""Settings of our models that the legacy format has no key for: new tokens, a template, a tower inside."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import CheckpointError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.formats import Checkpoint, read_json
from llava.model.checkpoint.legacy_keys import TEMPLATE_KEY
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.checkpoint.weight_names import EMBEDDINGS, HEAD
from llava.tokenization import token_id
from tests.support.legacy_folders import random_tensor, write_legacy, write_projector_only
from tests.support.model_tools import logits
from tests.support.tiny import tiny_llava


def save(loaded: LoadedModel, path: Path) -> Path:
    save_model(loaded.model, loaded.processor, path, origin=loaded.origin)
    return path


def table(loaded: LoadedModel, name: str = EMBEDDINGS) -> torch.Tensor:
    return loaded.model.state_dict()[name]


def test_tokens_that_were_added_keep_their_rows(tmp_path: Path) -> None:
    convert_checkpoint(write_legacy(tmp_path), tmp_path / "ours", "ours")
    loaded = load_checkpoint(tmp_path / "ours")
    loaded.processor.tokenizer.add_tokens(["pneumothorax"])
    loaded.model.resize_token_embeddings(263, mean_resizing=False)
    for name in (EMBEDDINGS, HEAD + "weight"):
        table(loaded, name)[262] = random_tensor((32,), 6)
    shutil.copytree(tmp_path / "ours" / "source", save(loaded, tmp_path / "grown") / "source")
    convert_checkpoint(tmp_path / "grown", tmp_path / "legacy", "legacy")
    assert Checkpoint.open(tmp_path / "legacy").config["vocab_size"] == 263
    again = load_checkpoint(tmp_path / "legacy")
    assert token_id(again.processor.tokenizer, "pneumothorax") == 262
    for name in (EMBEDDINGS, HEAD + "weight"):
        assert torch.equal(table(again, name)[262], table(loaded, name)[262])


@pytest.mark.parametrize("are_trained", [False, True])
def test_rows_that_loading_added_are_dropped_unless_they_were_trained(tmp_path: Path, are_trained: bool) -> None:
    source = write_legacy(tmp_path, mm_use_im_start_end=True)
    convert_checkpoint(source, tmp_path / "ours", "ours")
    loaded = load_checkpoint(tmp_path / "ours")
    assert loaded.model.config.marker_token_ids == [261, 262]
    if are_trained:
        table(loaded)[262] += 1
    save(loaded, tmp_path / "trained")
    convert_checkpoint(tmp_path / "trained", tmp_path / "legacy", "legacy")
    checkpoint = Checkpoint.open(tmp_path / "legacy")
    assert checkpoint.tensors["model.embed_tokens.weight"].shape[0] == checkpoint.config["vocab_size"]
    assert checkpoint.config["vocab_size"] == (263 if are_trained else 261)
    assert torch.equal(table(load_checkpoint(tmp_path / "legacy"))[:263], table(loaded)[:263])


def test_the_size_of_the_vocabulary_is_that_of_the_table(tmp_path: Path) -> None:
    convert_checkpoint(save(tiny_llava(), tmp_path / "ours"), tmp_path / "legacy", "legacy")
    checkpoint = Checkpoint.open(tmp_path / "legacy")
    names = read_json(tmp_path / "legacy" / "tokenizer_config.json")
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast", "transformers 4 has no other class for tokenizer.json"
    assert checkpoint.config["torch_dtype"] == "float32" and "dtype" not in checkpoint.config
    assert checkpoint.config["vocab_size"] == checkpoint.tensors["model.embed_tokens.weight"].shape[0] == 261


@pytest.mark.parametrize("template", ["chatml_direct", "vicuna_v1"])
def test_a_template_that_content_does_not_imply_is_written(tmp_path: Path, template: str) -> None:
    convert_checkpoint(save(tiny_llava(template=template), tmp_path / "ours"), tmp_path / "legacy", "legacy")
    named = Checkpoint.open(tmp_path / "legacy").config.get(TEMPLATE_KEY)
    assert named == (None if template == "vicuna_v1" else template)
    assert load_checkpoint(tmp_path / "legacy").processor.template.name == template
    convert_checkpoint(tmp_path / "legacy", tmp_path / "ours again", "ours")
    convert_checkpoint(tmp_path / "ours again", tmp_path / "legacy again", "legacy")
    assert Checkpoint.open(tmp_path / "legacy again").config == Checkpoint.open(tmp_path / "legacy").config


def test_a_projectors_template_is_written(tmp_path: Path) -> None:
    options = LoadOptions(base=str(tmp_path / "lm"), template="v0")
    convert_checkpoint(write_projector_only(tmp_path), tmp_path / "ours", "ours", options)
    convert_checkpoint(tmp_path / "ours", tmp_path / "legacy", "legacy")
    assert load_checkpoint(tmp_path / "legacy", base=str(tmp_path / "lm")).processor.template.name == "v0"


def test_lost_settings_are_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tiny_llava(system="Be brief.", placement="as_written"), tmp_path / "ours")
    with caplog.at_level(logging.WARNING):
        convert_checkpoint(tmp_path / "ours", tmp_path / "legacy", "legacy")
    assert caplog.text.count("a system text of its own and images placed as_written") == 1


@pytest.mark.parametrize("ways", [["legacy"], ["ours", "legacy"], ["hf", "legacy"], ["ours", "hf", "ours", "legacy"]])
def test_a_tower_inside_the_folder_is_copied(tmp_path: Path, ways: list[str]) -> None:
    source = write_legacy(tmp_path, tower_inside=False, mm_vision_tower="parts/tower")
    shutil.move(tmp_path / "tower", source / "parts" / "tower")
    expected, folder = logits(load_checkpoint(source)), source
    for number, way in enumerate(ways):
        convert_checkpoint(folder, tmp_path / f"{number} {way}", way)
        folder = tmp_path / f"{number} {way}"
    shutil.rmtree(source)
    assert torch.equal(logits(load_checkpoint(folder)), expected)
    assert not Checkpoint.open(folder).has_tower
    assert (folder / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("value", [{"a": 1}, ["v0"], 3])
def test_a_template_key_that_is_not_a_name(tmp_path: Path, value: Any) -> None:
    folder = write_legacy(tmp_path, llava_template=value)
    with pytest.raises(CheckpointError, match="llava_template is"):
        Checkpoint.open(folder)
    assert json.loads((folder / "config.json").read_text())[TEMPLATE_KEY] == value


@pytest.mark.parametrize("settings", [{"norm": "channel"}, {"temperature": 0.1}])
def test_projector_settings_that_the_format_cannot_hold_are_rejected(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The original cluster projector would give other values."""
    save(tiny_llava("cluster", projector_kwargs={"num_centers": 3, **settings}), tmp_path / "ours")
    with pytest.raises(CheckpointError, match=f"no key for the projector's {next(iter(settings))}"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "legacy", "legacy")
    assert not (tmp_path / "legacy").exists()
