"""Round trips legacy -> ours -> legacy, also through transformers' format if it can hold the model: bitwise equal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.export_hf import hf_obstacles
from llava.model.checkpoint.files.shards import list_tensors, open_tensors
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.legacy.export import export_legacy
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.checkpoint.tools.inspection import inspect_checkpoint
from llava.model.lora import add_lora, freeze_for
from tests.support.legacy_folders import OPTIONAL_KEYS, write_legacy, write_lora, write_projector_only
from tests.support.model_tools import logits, shake, trained
from tests.support.tiny import tiny_llava

KINDS: dict[str, dict[str, Any]] = {
    "llama, mlp, tower inside, safetensors": {},
    "llama, mlp, tower inside, bin, old buffers": {"safe": False, "old_buffers": True},
    "llama, linear, tower beside, sharded bin": {
        **{"projector": "linear", "tower_inside": False, "safe": False, "num_shards": 3}
    },
    "llama, cluster, type llama, sharded safetensors": {
        **{"projector": "cluster", "num_shards": 2, "model_type": "llama"}
    },
    "mistral, mlp, every key": {"lm": "mistral", "mm_patch_merge_type": "flat", **OPTIONAL_KEYS},
    "llama 1.6, tiles with row ends, sizes as text": {
        **{"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
        "image_grid_pinpoints": "[(56, 28), (28, 56)]",
    },
    "llama 1.6, tiles one after the other": {
        **{"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat", "image_grid_pinpoints": [[56, 56]]}
    },
    "llama, shape kept": {"image_aspect_ratio": "keep"},
    "llama, deep mlp, tower beside, safetensors": {"projector": "mlp3x_gelu", "tower_inside": False},
    "mistral, linear, tower inside, sharded bin": {
        **{"lm": "mistral", "projector": "linear", "safe": False, "num_shards": 2}
    },
    "patch tokens": {"style": "patch_token", "projector": "linear", "tower_inside": False, "old_buffers": True},
}
ORACLES = (
    ("llava-1.2.2", "out/stage2"),
    ("llava-med-1.0", "out/stage1"),
    ("llava-med-1.0", "out/stage2_v0"),
    ("llava-med-1.0", "out/stage2_v1"),
    ("llava-med-1.5-mistral", "llava-med-mistral-tiny"),
    ("llava-rad", "out/stage2"),
    ("stllava-med", "out/full"),
    ("stllava-med", "out/dpo_policy"),
    ("llava-1.2.2", "out/llava-lora"),
    ("llava-rad", "out/llavarad-lora"),
    ("stllava-med", "out/llava-lora"),
    ("llava-1.2.2", "out/stage1"),
    ("llava-rad", "out/stage1"),
)


def tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's weight files."""
    checkpoint = Checkpoint.open(path)
    files = {entry.file for entry in (*checkpoint.tensors.values(), *checkpoint.extra.values())}
    return {name: tensor for file in files for name, tensor in open_tensors(file)}


def assert_same_files(before: Path, after: Path) -> None:
    first, second = tensors(before), tensors(after)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    for name in ("config.json", "adapter_config.json"):
        if (before / name).is_file():
            assert json.loads((after / name).read_text()) == json.loads((before / name).read_text()), name
    if inner := Checkpoint.open(before).tower_adapter:
        assert_same_files(inner, after / "Vit-lora")


def round_trip(source: Path, work: Path, options: LoadOptions) -> str:
    """Convert to ours and back, and through transformers' format if it can hold the model; return the path taken."""
    convert_checkpoint(source, work / "ours", "ours", options)
    convert_checkpoint(work / "ours", work / "legacy", "legacy")
    assert_same_files(source, work / "legacy")
    checkpoint = Checkpoint.open(source)
    if checkpoint.kind != "legacy" or hf_obstacles(load_checkpoint(work / "ours")):
        return "ours"
    convert_checkpoint(work / "ours", work / "hf", "hf")
    convert_checkpoint(work / "hf", work / "ours again", "ours")
    convert_checkpoint(work / "ours again", work / "legacy again", "legacy")
    assert_same_files(source, work / "legacy again")
    return "ours, hf"


SPECIFIED_KEYS = {
    *("model_type", "architectures", "use_mm_proj", "mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer"),
    *("mm_vision_select_feature", "mm_projector_type", "mm_use_im_start_end", "mm_use_im_patch_token"),
    *("tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "image_aspect_ratio", "mm_patch_merge_type"),
    *("image_grid_pinpoints", "tokenizer_padding_side", "tokenizer_model_max_length", "mm_projector_lr"),
    *("unfreeze_mm_vision_tower", "mm_vision_tower_lr", "mm_resampler_type", "max_sequence_length"),
}
"""Keys of config.json in the legacy formats."""


def test_every_specified_key_makes_a_round_trip(tmp_path: Path) -> None:
    """One of the kinds has all of them, and an unknown key; the round trip below compares whole files."""
    source = write_legacy(tmp_path, **KINDS["mistral, mlp, every key"])
    assert SPECIFIED_KEYS | {"a_key_of_tomorrow"} <= json.loads((source / "config.json").read_text()).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_accounted_for(tmp_path: Path, kind: str) -> None:
    """No tensor of the files is dropped silently: each has one row in the table, loaded or computed."""
    source = write_legacy(tmp_path, **KINDS[kind])
    rows = [row for row in inspect_checkpoint(source).rows if row.name]
    assert sorted(row.name for row in rows) == sorted(list_tensors(source))
    assert {row.status for row in rows} <= {"loaded", "renamed", "computed"}


@pytest.mark.parametrize("kind", KINDS)
def test_written_by_hand(tmp_path: Path, kind: str) -> None:
    source = write_legacy(tmp_path, **KINDS[kind])
    way = round_trip(source, tmp_path, LoadOptions())
    sys.stdout.write(f"{kind}: legacy -> {way} -> legacy, every bit\n")  # listed by pytest -rP
    assert way == ("ours, hf" if ", mlp" in kind or ", linear" in kind else "ours")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "legacy" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(("oracle", "folder"), ORACLES)
def test_recorded(shared: Path, tmp_path: Path, oracle: str, folder: str) -> None:
    root = shared / "oracles" / oracle
    config = json.loads((root / folder / "config.json").read_text())
    parts = {name: config.get(f"mm_{name}") for name in ("vision_tower_config", "vision_tower_checkpoint")}
    way = round_trip(
        root / folder,
        tmp_path,
        LoadOptions(
            base=str(root / "base_llm") if (root / "base_llm").is_dir() else None,
            vision_tower=str(root / config["mm_vision_tower"]),
            **{name: str(root / value) for name, value in parts.items() if value},
        ),
    )
    sys.stdout.write(f"{oracle}, {folder}: legacy -> {way} -> legacy, every bit\n")
    assert way == ("ours, hf" if folder in ("out/stage2", "llava-med-mistral-tiny") and "rad" not in oracle else "ours")


@pytest.mark.parametrize("safe", [True, False])
def test_adapters(tmp_path: Path, safe: bool) -> None:
    source = write_lora(tmp_path, tower_adapter=True, safe=safe)
    options = LoadOptions(base=str(tmp_path / "lm"))
    convert_checkpoint(source, tmp_path / "ours", "ours", options)
    convert_checkpoint(tmp_path / "ours", tmp_path / "legacy", "legacy")
    assert_same_files(source, tmp_path / "legacy")
    before = load_checkpoint(source, base=str(tmp_path / "lm"), merge=False)
    after = load_checkpoint(tmp_path / "ours", merge=False)
    assert torch.equal(logits(before), logits(after))


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."])
def test_projectors_of_every_generation(tmp_path: Path, prefix: str) -> None:
    source = write_projector_only(tmp_path, prefix=prefix)
    convert_checkpoint(source, tmp_path / "ours", "ours", LoadOptions(base=str(tmp_path / "lm")))
    convert_checkpoint(tmp_path / "ours", tmp_path / "legacy", "legacy")
    assert_same_files(source, tmp_path / "legacy")
    assert torch.equal(
        logits(load_checkpoint(tmp_path / "ours")), logits(load_checkpoint(source, base=str(tmp_path / "lm")))
    )


@pytest.mark.parametrize("lm", ["llama", "mistral"])
def test_models_made_here_become_legacy(tmp_path: Path, lm: str) -> None:
    loaded = tiny_llava(lm=lm, image_mode="pad")
    save_model(loaded.model, loaded.processor, tmp_path / "ours", origin=loaded.origin)
    convert_checkpoint(tmp_path / "ours", tmp_path / "legacy", "legacy")
    checkpoint = Checkpoint.open(tmp_path / "legacy")
    assert (checkpoint.kind, checkpoint.style, checkpoint.text_type) == ("legacy", "placeholder", lm)
    again = load_checkpoint(tmp_path / "legacy")
    state, before = again.model.state_dict(), loaded.model.state_dict()
    for name, tensor in before.items():
        rows = slice(-1) if name.endswith(("embed_tokens.weight", "lm_head.weight")) else slice(None)
        assert torch.equal(state[name][rows], tensor[rows]), name
    assert again.processor.image_mode == "pad"


def test_a_legacy_export_does_not_need_the_folders_it_was_built_from(tmp_path: Path) -> None:
    loaded = tiny_llava()  # its parts are gone by now
    export_legacy(loaded, tmp_path / "legacy")
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "legacy")), logits(loaded), rtol=0, atol=0)


def test_adapters_and_projectors_made_here_become_legacy(tmp_path: Path, built: LoadedModel) -> None:
    save_projector(built.model, built.processor, tmp_path / "projector", origin=built.origin)
    convert_checkpoint(tmp_path / "projector", tmp_path / "legacy projector", "legacy")
    base = str(tmp_path / "parts" / "lm")
    again = load_checkpoint(tmp_path / "legacy projector", base=base, template="vicuna_v1")
    torch.testing.assert_close(logits(again), logits(built), rtol=0, atol=1e-6)
    network = add_lora(built, r=4, alpha=8)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    network.eval()
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    convert_checkpoint(tmp_path / "adapter", tmp_path / "legacy adapter", "legacy")
    assert Checkpoint.open(tmp_path / "legacy adapter").kind == "legacy_adapter"
    again = load_checkpoint(tmp_path / "legacy adapter", base=base, merge=False)
    torch.testing.assert_close(logits(again), logits(built), rtol=0, atol=1e-5)


def test_options_that_a_rewritten_part_does_not_take_are_rejected(tmp_path: Path, built: LoadedModel) -> None:
    half = LoadOptions(dtype=torch.float16)
    stage1 = write_projector_only(tmp_path)
    with pytest.raises(ConfigError, match=r"omit --dtype, or .* --to model"):
        convert_checkpoint(
            stage1, tmp_path / "out", "ours", LoadOptions(base=str(tmp_path / "lm"), dtype=torch.float16)
        )
    save_projector(built.model, built.processor, tmp_path / "projector", origin=built.origin)
    with pytest.raises(ConfigError, match="omit --dtype"):
        convert_checkpoint(tmp_path / "projector", tmp_path / "out", "legacy", half)
    with pytest.raises(ConfigError, match="--model-base, --template would change nothing"):
        convert_checkpoint(tmp_path / "projector", tmp_path / "out", "legacy", LoadOptions(base="x", template="plain"))
    assert not (tmp_path / "out").exists()


def test_a_projector_whose_file_names_no_language_model_becomes_a_whole_legacy_configuration(tmp_path: Path) -> None:
    """Stage 1 of some trainers writes only the `mm_` keys; the language model's sizes are those of its base."""
    stage1 = write_projector_only(tmp_path)
    config = json.loads((stage1 / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key.startswith(("mm_", "tune_", "image_"))}
    (stage1 / "config.json").write_text(json.dumps({**kept, "a_key_of_tomorrow": 1}))
    base = LoadOptions(base=str(tmp_path / "lm"))
    convert_checkpoint(stage1, tmp_path / "legacy", "legacy", base)
    written = json.loads((tmp_path / "legacy" / "config.json").read_text())
    assert {key: written[key] for key in ("hidden_size", "num_hidden_layers")} == {
        key: config[key] for key in ("hidden_size", "num_hidden_layers")
    }
    assert (written["model_type"], written["a_key_of_tomorrow"]) == ("llava_llama", 1)
    again = load_checkpoint(tmp_path / "legacy")
    torch.testing.assert_close(logits(again), logits(load_checkpoint(stage1, base=base.base, template="vicuna_v1")))
