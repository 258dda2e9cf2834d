"""Loading: folders are recognized by content, saved weights load bitwise equal, a mismatch is one line of error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.errors import CheckpointError, ConfigError
from llava.model.builder import LoadedModel, build_model
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.formats import EXTRA_FILE, ORIGIN_FILE, Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.lora import add_lora, freeze_for, train_marker_rows
from tests.support.model_tools import logits, shake, trained
from tests.support.tiny import TOWERS, tiny_llava, write_tiny_lm, write_tiny_tower


def adapted(loaded: LoadedModel, folder: Path) -> Tensor:
    """Give an adapter random weights, save it, and return its logits."""
    network = add_lora(loaded, r=4, alpha=8)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    network.eval()
    save_adapter(network, loaded.processor, folder, origin=loaded.origin)
    return logits(loaded)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu", "identity"])
def test_a_model_loads_bitwise_equal(tmp_path: Path, tower: str, projector: str) -> None:
    tie = tower in ("siglip", "vit")
    loaded = tiny_llava(projector, tower, tie=tie, image_mode="pad", placement="as_written", system="Be brief.")
    expected = logits(loaded)
    save_model(loaded.model, loaded.processor, tmp_path, origin=loaded.origin)
    assert Checkpoint.open(tmp_path).kind == "model"
    again = load_checkpoint(tmp_path)
    assert torch.equal(logits(again), expected)
    assert not again.model.training
    assert again.processor.image_mode == again.model.config.image_aspect_ratio == "pad"
    assert again.processor.placement == again.model.config.placement == "as_written"
    assert again.processor.system == "Be brief."
    state, before = again.model.state_dict(), loaded.model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    tables = (again.model.get_input_embeddings().weight, again.model.get_output_embeddings().weight)
    assert (tables[0] is tables[1]) == tie


def test_dtype(tmp_path: Path, tiny: LoadedModel) -> None:
    save_model(tiny.model.to(torch.bfloat16), tiny.processor, tmp_path)
    assert load_checkpoint(tmp_path).model.dtype == torch.bfloat16
    assert load_checkpoint(tmp_path, dtype=torch.float32).model.dtype == torch.float32


def test_projector_folder(tmp_path: Path, built: LoadedModel) -> None:
    freeze_for(built.model, projector_only=True)
    train_marker_rows(built.model, built.model.config.marker_token_ids)
    shake(dict(built.model.model.multi_modal_projector.named_parameters()))
    with torch.no_grad():
        built.model.get_input_embeddings().weight[built.model.config.marker_token_ids] += 1
    save_projector(built.model, built.processor, tmp_path / "stage1", origin=built.origin)
    assert Checkpoint.open(tmp_path / "stage1").kind == "projector"
    again = load_checkpoint(tmp_path / "stage1")
    assert torch.equal(logits(again), logits(built))
    (tmp_path / "stage1" / "mm_projector.safetensors").unlink()
    assert torch.equal(logits(load_checkpoint(tmp_path / "stage1")), logits(built))


def test_adapter_folder(tmp_path: Path, built: LoadedModel) -> None:
    untrained = logits(built)
    expected = adapted(built, tmp_path / "adapter")
    assert (expected - untrained).abs().max() > 0.1
    assert Checkpoint.open(tmp_path / "adapter").kind == "adapter"
    kept = load_checkpoint(tmp_path / "adapter", merge=False)
    assert isinstance(kept.model, PeftModel)
    assert torch.equal(logits(kept), expected)
    merged = load_checkpoint(tmp_path / "adapter")
    assert not any("lora_" in name for name, _ in merged.model.named_parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_an_adapter_keeps_the_projector_it_was_trained_with(tmp_path: Path, built: LoadedModel) -> None:
    """A frozen projector and marker rows of an earlier stage are not in the base that loading builds."""
    shake(dict(built.model.model.multi_modal_projector.named_parameters()))
    with torch.no_grad():
        built.model.get_input_embeddings().weight[built.model.config.marker_token_ids] += 1
    network = add_lora(built, r=4)
    freeze_for(network, has_adapter=True, freeze_projector=True)
    shake(trained(network))
    network.eval()
    save_adapter(network, built.processor, tmp_path, origin=built.origin)
    assert torch.equal(logits(load_checkpoint(tmp_path, merge=False)), logits(built))


def test_an_adapter_on_an_adapter(tmp_path: Path, built: LoadedModel) -> None:
    adapted(built, tmp_path / "first")
    second = load_checkpoint(tmp_path / "first")
    expected = adapted(second, tmp_path / "second")
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "second")), expected, rtol=0, atol=1e-5)


def test_base_of_ones_own(tmp_path: Path, built: LoadedModel) -> None:
    expected = adapted(built, tmp_path / "adapter")
    shutil.move(tmp_path / "parts" / "lm", tmp_path / "moved")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(tmp_path / "adapter")
    again = load_checkpoint(
        tmp_path / "adapter", base=str(tmp_path / "moved")
    )  # a plain language model: the tower is recorded
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    whole = build_model(
        str(tmp_path / "moved"), str(tmp_path / "parts" / "tower"), projector_type="mlp2x_gelu", use_im_start_end=True
    )
    save_model(whole.model, whole.processor, tmp_path / "whole")
    (tmp_path / "adapter" / ORIGIN_FILE).unlink()
    with pytest.raises(CheckpointError, match="--model-base"):
        load_checkpoint(tmp_path / "adapter")
    again = load_checkpoint(tmp_path / "adapter", base=str(tmp_path / "whole"))
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)


def break_weights(folder: Path, change: str) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["model.language_model.layers.7.extra"] = torch.zeros(2)
    elif change == "mismatched":
        weights[name] = torch.zeros(3, 3)
    save_file(weights, file, metadata={"format": "pt"})
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched", "cut"])
def test_broken_weights_are_one_line(tmp_path: Path, tiny: LoadedModel, change: str) -> None:
    save_model(tiny.model, tiny.processor, tmp_path)
    break_weights(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    expected = {"missing": "missing_keys", "unexpected": "unexpected_keys", "mismatched": "", "cut": "truncated"}
    assert expected[change] in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json that names a model type; found nothing"),
        ({"notes.txt": ""}, "found notes.txt"),
        ({"config.json": "{"}, "config.json cannot be read as JSON"),
        ({"config.json": "[]"}, "holds no JSON object"),
        ({"config.json": '{"model_type": "llava_med"}'}, "config.json without weights"),
        ({"config.json": '{"model_type": "llava_mistral"}', "pytorch_model.bin": ""}, "truncated, or older than torch"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": ""}, "not a complete safetensors file"),
        ({"config.json": '{"model_type": "bert"}'}, "without weights"),
    ],
)
def test_anything_else_is_explained(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_tiny_lm, r"a plain language model .type 'llama'., only a part of a model"),
        (write_tiny_tower, r"a vision tower .type 'clip_vision_model'., only a part of a model"),
    ],
)
def test_parts_are_not_models(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(tmp_path / "part"))


def test_a_folder_without_processor(tmp_path: Path, tiny: LoadedModel) -> None:
    save_model(tiny.model, tiny.processor, tmp_path)
    (tmp_path / "llava_processor.json").unlink()
    with pytest.raises(CheckpointError, match="llava_processor"):
        load_checkpoint(tmp_path)


def test_adapters_that_do_not_fit(tmp_path: Path, built: LoadedModel) -> None:
    adapted(built, tmp_path / "adapter")
    deep = str(write_tiny_lm(tmp_path / "deep", num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(tmp_path / "adapter", base=deep)
    wide = str(write_tiny_lm(tmp_path / "wide", hidden_size=64))
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        load_checkpoint(tmp_path / "adapter", base=wide)
    assert "\n" not in str(caught.value)
    (tmp_path / "adapter" / EXTRA_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin: no such file"):
        load_checkpoint(tmp_path / "adapter")


def test_parts_that_would_be_unused_are_rejected(tmp_path: Path) -> None:
    loaded = tiny_llava(template="vicuna_v1", image_mode="pad")
    save_model(loaded.model, loaded.processor, tmp_path / "model", origin=loaded.origin)
    save_projector(loaded.model, loaded.processor, tmp_path / "projector", origin=loaded.origin)
    export_hf(tiny_llava(), tmp_path / "hf")
    for folder in ("model", "hf"):
        with pytest.raises(ConfigError, match=r"--model-base would change nothing.*Used with it: --template"):
            load_checkpoint(tmp_path / folder, base="another")
    for folder in ("model", "hf", "projector"):
        with pytest.raises(ConfigError, match="--vision-tower would change nothing"):
            load_checkpoint(tmp_path / folder, vision_tower="another")


def test_another_template_is_set_in_model_and_processor(tmp_path: Path) -> None:
    loaded = tiny_llava(template="vicuna_v1")
    save_model(loaded.model, loaded.processor, tmp_path, origin=loaded.origin)
    again = load_checkpoint(tmp_path, template="mistral_instruct")
    assert again.processor.template.name == again.model.config.template == "mistral_instruct"


def test_an_adapter_in_a_bin_file(tmp_path: Path, built: LoadedModel) -> None:
    """Other programs write peft adapters so; a message about its weights names this file."""
    network = add_lora(built, r=2)
    shake(trained(network))
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    expected = logits(load_checkpoint(tmp_path / "adapter"))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    assert torch.equal(logits(load_checkpoint(tmp_path / "adapter")), expected)
    torch.save({**weights, "stranger": torch.ones(1)}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin.*stranger"):
        load_checkpoint(tmp_path / "adapter")


def test_adapters_that_name_each_other(tmp_path: Path, built: LoadedModel) -> None:
    network = add_lora(built, r=2)
    for name in ("a", "b"):
        save_adapter(network, built.processor, tmp_path / name, origin=built.origin)
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name / ORIGIN_FILE).write_text(json.dumps({"base": str(tmp_path / other)}))
    with pytest.raises(CheckpointError, match=r"names itself as its base \(.*a -> .*b -> .*a\)") as caught:
        load_checkpoint(tmp_path / "a")
    assert "\n" not in str(caught.value)
