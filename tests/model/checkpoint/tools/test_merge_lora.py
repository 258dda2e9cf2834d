"""`merge_lora_weights` writes the tensors that loading with merging gives; errors leave nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import CheckpointError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter
from llava.model.checkpoint.tools.merge_lora import merge_lora
from llava.model.lora import add_lora
from tests.support.legacy_folders import (
    projector_weights,
    random_tensor,
    write_legacy,
    write_lora,
    write_projector_only,
)
from tests.support.model_tools import shake, trained
from tests.support.processes import run_command

SCRIPT = Path(__file__).resolve().parents[4] / "scripts" / "merge_lora_weights.py"


def assert_same(one: LoadedModel, other: LoadedModel) -> None:
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different


def run(python: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return run_command([python, SCRIPT, *words], cwd=SCRIPT.parents[1], timeout=900)


def test_the_printed_command(tmp_path: Path, python: Path) -> None:
    lora = write_lora(tmp_path, safe=False)
    target = tmp_path / "merged"
    done = run(python, "--model-path", lora, "--model-base", tmp_path / "lm", "--save-model-path", target)
    assert done.returncode == 0, done.stderr
    checkpoint = Checkpoint.open(target)
    assert checkpoint.kind == "legacy" and not checkpoint.has_tower and checkpoint.has_tokenizer
    assert checkpoint.config["mm_vision_tower"] == str(tmp_path / "tower")
    kept = {key: value for key, value in Checkpoint.open(lora).config.items() if key.startswith("mm_")}
    assert kept and kept.items() <= checkpoint.config.items()
    assert checkpoint.config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert_same(load_checkpoint(target), load_checkpoint(lora, base=str(tmp_path / "lm")))


def test_a_wrong_base_is_rejected_in_one_line_and_nothing_is_left(tmp_path: Path, python: Path) -> None:
    lora = write_lora(tmp_path)
    weights = load_file(tmp_path / "lm" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 65)
    save_file(weights, tmp_path / "lm" / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    words = ["--model-path", lora, "--model-base", tmp_path / "lm", "--save-model-path", tmp_path / "a" / "merged"]
    done = run(python, *words)
    assert done.returncode == 2 and "does not fit" in done.stderr and "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("include_tower", [False, True])
def test_an_adapter_of_the_tower_gives_a_separate_tower(tmp_path: Path, include_tower: bool) -> None:
    lora = write_lora(tmp_path, tower_adapter=True)
    base = str(tmp_path / "lm")
    merge_lora(lora, base, tmp_path / "merged", include_tower=include_tower)
    wanted = load_checkpoint(lora, base=base)
    assert_same(load_checkpoint(tmp_path / "merged"), wanted)
    changed = load_file(tmp_path / "merged" / "vision_tower" / "model.safetensors")
    assert changed.keys() == load_file(tmp_path / "tower" / "model.safetensors").keys()
    projector = torch.load(tmp_path / "merged" / "mm_projector.bin", weights_only=True)
    assert all(torch.equal(projector[name], tensor) for name, tensor in projector_weights("mlp2x_gelu").items())
    merge_lora(lora / "any-name", str(tmp_path / "tower"), tmp_path / "tower-alone")
    alone = load_file(tmp_path / "tower-alone" / "model.safetensors")
    assert all(torch.equal(alone[name], tensor) for name, tensor in changed.items())


def test_a_self_contained_folder_needs_nothing_else(tmp_path: Path) -> None:
    lora = write_lora(tmp_path)
    merge_lora(lora, str(tmp_path / "lm"), tmp_path / "merged", include_tower=True)
    wanted = load_checkpoint(lora, base=str(tmp_path / "lm"))
    (tmp_path / "tower").rename(tmp_path / "gone")
    moved = (tmp_path / "merged").rename(tmp_path / "elsewhere")
    assert_same(load_checkpoint(moved), wanted)


def test_a_whole_model_takes_a_tower_adapter(tmp_path: Path) -> None:
    lora = write_lora(tmp_path, tower_adapter=True)
    whole = write_legacy(tmp_path, tower_inside=True, num_shards=2, name="inside", old_buffers=True)
    adapter = str(lora / "any-name")
    merge_lora(whole, None, tmp_path / "merged", options=LoadOptions(tower_adapter=adapter))
    assert_same(load_checkpoint(tmp_path / "merged"), load_checkpoint(whole, tower_adapter=adapter))
    assert not any("inv_freq" in name for name in Checkpoint.open(tmp_path / "merged").tensors)
    with pytest.raises(CheckpointError, match="no adapter to merge"):
        merge_lora(whole, None, tmp_path / "second")


@pytest.mark.parametrize("rows", [2, 261 + 4])
def test_a_projector_alone_with_its_embedding_rows(tmp_path: Path, rows: int) -> None:
    folder = write_projector_only(tmp_path, mm_use_im_start_end=True)
    weights = {**projector_weights("mlp2x_gelu"), "model.embed_tokens.weight": random_tensor((rows, 32), 1)}
    torch.save(weights, folder / "mm_projector.bin")
    merge_lora(folder, str(tmp_path / "lm"), tmp_path / "merged")
    merged = load_checkpoint(tmp_path / "merged", vision_tower=str(tmp_path / "tower"))
    wanted = load_checkpoint(folder, base=str(tmp_path / "lm"))
    assert_same(merged, wanted)
    count = Checkpoint.open(tmp_path / "merged").tensors["model.embed_tokens.weight"].shape[0]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == count


def test_our_own_adapter_becomes_our_model(tmp_path: Path, built: LoadedModel) -> None:
    adapted = add_lora(built, r=4, alpha=8)
    shake(trained(adapted))
    save_adapter(adapted, built.processor, tmp_path / "adapter", origin=built.origin)
    merge_lora(tmp_path / "adapter", None, tmp_path / "merged")
    assert Checkpoint.open(tmp_path / "merged").kind == "model"
    assert_same(load_checkpoint(tmp_path / "merged"), load_checkpoint(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "name", ["llava-1.2.2/out/llava-lora", "llava-rad/out/llavarad-lora", "stllava-med/out/llava-lora"]
)
def test_recorded_adapters(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Merged into a self-contained folder, they equal the adapter on its base and tower."""
    oracle = shared.resolve() / "oracles" / name.split("/", maxsplit=1)[0]
    monkeypatch.chdir(oracle)
    merge_lora(oracle.parent / name, str(oracle / "base_llm"), tmp_path / "merged", include_tower=True)
    wanted = load_checkpoint(oracle.parent / name, base=str(oracle / "base_llm"))
    monkeypatch.chdir(tmp_path)
    assert_same(load_checkpoint(tmp_path / "merged"), wanted)


def test_a_trained_newline_embedding_is_merged_too(tmp_path: Path) -> None:
    folder = write_projector_only(
        tmp_path, mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres", image_grid_pinpoints=[[56, 28]]
    )
    weights = {**projector_weights("mlp2x_gelu"), "model.image_newline": random_tensor((32,), 8)}
    torch.save(weights, folder / "mm_projector.bin")
    merge_lora(folder, str(tmp_path / "lm"), tmp_path / "merged")
    merged = load_checkpoint(tmp_path / "merged")
    assert torch.equal(merged.model.state_dict()["model.image_newline"], weights["model.image_newline"])
    assert_same(merged, load_checkpoint(folder, base=str(tmp_path / "lm")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16', which changes the base too"),
    ],
)
def test_unsupported_adapters_are_rejected_by_name(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    lora = write_lora(tmp_path)
    file = lora / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(CheckpointError, match=message) as caught:
        merge_lora(lora, str(tmp_path / "lm"), tmp_path / "merged")
    assert "merge_and_unload" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_a_quantized_base_is_rejected(tmp_path: Path) -> None:
    lora = write_lora(tmp_path)
    weights = load_file(tmp_path / "lm" / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(512, 1, dtype=torch.uint8)
    save_file(weights, tmp_path / "lm" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.weight is uint8, so it is quantized"):
        merge_lora(lora, str(tmp_path / "lm"), tmp_path / "merged")
