"""Saved files: written completely or not at all, under names that other tools read, and never executed when read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llava.errors import CheckpointError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.load_parts import load_projector
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.lora import add_lora
from tests.support.model_tools import logits, shake
from tests.support.tiny import tiny_llava


def test_large_models_are_sharded_and_old_shards_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_llava()
    save_model(loaded.model, loaded.processor, tmp_path)
    shake(dict(loaded.model.named_parameters()))
    whole_save = type(loaded.model).save_pretrained
    with monkeypatch.context() as patch:
        patch.setattr(
            type(loaded.model),
            "save_pretrained",
            lambda model, folder, **keywords: whole_save(model, folder, max_shard_size="100KB", **keywords),
        )
        save_model(loaded.model, loaded.processor, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(load_checkpoint(tmp_path)), logits(loaded))
    save_model(loaded.model, loaded.processor, tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_use_cache_is_on_in_what_is_saved(tmp_path: Path, tiny: LoadedModel) -> None:
    tiny.model.config.use_cache = tiny.model.config.text_config.use_cache = False
    save_model(tiny.model, tiny.processor, tmp_path)
    assert tiny.model.config.text_config.use_cache is False
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["text_config"].get("use_cache", True) is True
    assert saved.get("use_cache", True) is True


def test_an_interrupted_save_leaves_the_old_model(
    tmp_path: Path, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny.model, tiny.processor, tmp_path)
    expected = logits(tiny)
    shake(dict(tiny.model.named_parameters()))

    def half(model: object, folder: Path, **_: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tiny.model), "save_pretrained", half)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny.model, tiny.processor, tmp_path)
    assert torch.equal(logits(load_checkpoint(tmp_path)), expected)
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.parametrize(
    ("prefix", "layers"),
    [
        ("model.mm_projector.", ("0", "2")),
        ("base_model.model.model.mm_projector.", ("0", "2")),
        ("model.multi_modal_projector.", ("0", "2")),
        ("multi_modal_projector.", ("linear_1", "linear_2")),
    ],
)
def test_published_names_of_the_projector(
    tmp_path: Path, tiny: LoadedModel, prefix: str, layers: tuple[str, str]
) -> None:
    weights = {name: tensor + 1 for name, tensor in tiny.model.model.multi_modal_projector.state_dict().items()}
    names = dict(zip(("0", "2"), layers, strict=True))
    torch.save({f"{prefix}{names[name[0]]}{name[1:]}": tensor for name, tensor in weights.items()}, tmp_path / "x.bin")
    loaded = tiny_llava()
    load_projector(loaded.model, tmp_path / "x.bin")
    state = loaded.model.model.multi_modal_projector.state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in weights)


@pytest.mark.parametrize("num_rows", [2, 300])
def test_marker_rows_of_a_file_with_another_vocabulary(tmp_path: Path, num_rows: int) -> None:
    """Files of the original trainers hold the new rows or a whole table; the markers are its last rows."""
    loaded = tiny_llava("linear", use_im_start_end=True)
    markers = loaded.model.config.marker_token_ids
    before = loaded.model.get_input_embeddings().weight.detach().clone()
    table = torch.rand(num_rows, 32)
    projector = loaded.model.model.multi_modal_projector.state_dict()
    content = {f"model.mm_projector.{name}": tensor for name, tensor in projector.items()}
    torch.save({**content, "model.embed_tokens.weight": table}, tmp_path / "mm_projector.bin")
    load_projector(loaded.model, tmp_path)
    after = loaded.model.get_input_embeddings().weight
    assert torch.equal(after[markers], table[-2:])
    others = [row for row in range(len(before)) if row not in markers]
    assert torch.equal(after[others], before[others])
    torch.save({**content, "model.embed_tokens.weight": torch.rand(2, 31)}, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"embedding rows are \(2, 31\), expected 2 of 32"):
        load_projector(loaded.model, tmp_path)


def test_a_projector_that_does_not_fit(tmp_path: Path) -> None:
    linear = tiny_llava("linear")
    save_projector(linear.model, linear.processor, tmp_path)
    with pytest.raises(CheckpointError, match=r"the projector does not fit; got .*'weight'.* expected .*'0.weight'"):
        load_projector(tiny_llava("mlp2x_gelu").model, tmp_path)
    with pytest.raises(CheckpointError, match="no projector; expected a file"):
        load_projector(linear.model, tmp_path / "nowhere")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("hacked"),))  # type: ignore[return-value]


def test_pickles_are_not_executed(tmp_path: Path, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model.mm_projector.weight": Evil()}, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_projector(tiny.model, tmp_path / "mm_projector.bin")
    assert not (tmp_path / "hacked").exists()
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(CheckpointError, match="no table of tensors"):
        load_projector(tiny.model, tmp_path / "list.bin")


def test_saved_weights_open_without_this_package(tmp_path: Path, built: LoadedModel) -> None:
    """The language model's weights keep transformers' names, which other tools read."""
    save_model(built.model, built.processor, tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    plain = set(AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "lm").state_dict())
    assert {
        f"model.language_model.{name.removeprefix('model.')}" for name in plain if name != "lm_head.weight"
    } <= names
    assert "lm_head.weight" in names


def test_the_last_kind_that_was_saved_is_the_one_that_loads(tmp_path: Path) -> None:
    """A run may be repeated in its folder as another kind; nothing of the earlier run may be read then."""
    loaded = tiny_llava()
    save_model(loaded.model, loaded.processor, tmp_path)
    adapted = tiny_llava()
    network = add_lora(adapted, r=2)
    save_adapter(network, adapted.processor, tmp_path, origin=adapted.origin)
    assert Checkpoint.open(tmp_path).kind == "adapter" and not list(tmp_path.glob("model*"))
    save_projector(loaded.model, loaded.processor, tmp_path, origin=loaded.origin)
    assert Checkpoint.open(tmp_path).kind == "projector" and not list(tmp_path.glob("adapter*"))
    save_model(loaded.model, loaded.processor, tmp_path)
    assert Checkpoint.open(tmp_path).kind == "model" and not list(tmp_path.glob("mm_projector*"))


def test_nothing_is_written_over_its_base(tmp_path: Path) -> None:
    loaded = tiny_llava()
    save_model(loaded.model, loaded.processor, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="builds on"):
        save_projector(loaded.model, loaded.processor, tmp_path, origin={"base": str(tmp_path)})
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_modes_of_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    loaded = tiny_llava()
    before = os.umask(umask)
    try:
        save_model(loaded.model, loaded.processor, tmp_path / "model", origin=loaded.origin)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}
