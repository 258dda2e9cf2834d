"""Inspection without torch, the doctor's findings, and differences between two checkpoints."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava import cli
from llava.errors import CheckpointError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.checkpoint.tools.doctor import DoctorFinding, check_weights, find_problems
from llava.model.checkpoint.tools.inspection import inspect_checkpoint, inspection_text
from tests.support.legacy_folders import (
    OPTIONAL_KEYS,
    projector_weights,
    write_legacy,
    write_lora,
    write_projector_only,
    write_weights,
)
from tests.support.tiny import write_tiny_lm, write_tiny_tower


def statuses(path: Path) -> Counter[str]:
    return inspect_checkpoint(path).counts


def findings(path: Path) -> list[DoctorFinding]:
    return list(find_problems(inspect_checkpoint(path)))


def errors(path: Path) -> str:
    return "; ".join(finding.text for finding in findings(path) if finding.level == "error")


@pytest.mark.parametrize("safe", [True, False])
def test_inspect_imports_neither_torch_nor_transformers(tmp_path: Path, safe: bool) -> None:
    folder = write_legacy(tmp_path, safe=safe, num_shards=2)
    code = (
        "import sys\nfrom llava.cli import main\nmain(['checkpoint', 'inspect', sys.argv[1]])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.mm_projector.0.weight" in done.stdout
    assert "model.multi_modal_projector.0.weight" in done.stdout


def test_weights_are_not_read(tmp_path: Path) -> None:
    """Weights may have any value: only headers are read."""
    folder = write_legacy(tmp_path)
    before = inspection_text(inspect_checkpoint(folder))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4000:] = b"\xff" * 4000
    file.write_bytes(content)
    assert inspection_text(inspect_checkpoint(folder)) == before


@pytest.mark.parametrize("escape", ["\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\u202eorder", "back\x08\n\x7f"])
def test_control_characters_of_tensor_names_are_visible_escapes(
    tmp_path: Path, escape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_legacy(tmp_path, safe=False)
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    change(folder, add={f"model.{escape}.weight": torch.ones(2)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, f"mm_{escape}": escape, "mm_vision_tower": escape}))
    names = [row.name for row in inspect_checkpoint(folder).rows]
    assert f"model.{escape}.weight" in names
    for words in (["inspect", folder], ["doctor", folder], ["diff", folder, plain], ["inspect", folder, "--json"]):
        with contextlib.suppress(SystemExit):
            cli.main(["checkpoint", *map(str, words)])
        shown = capsys.readouterr()
        for text in (shown.out, shown.err):
            assert not set(escape) & set(text) & set("\x1b\x07\x08\x7f\x9b\u202e")
    assert f"model.{escape}.weight" in [row["name"] for row in json.loads(shown.out)["tensors"]]


def test_recognized_by_content_in_any_folder(tmp_path: Path, tiny: LoadedModel) -> None:
    root = tmp_path / "llava-lora-mpt-projector"
    root.mkdir()
    kinds = {"legacy": write_legacy(root), "language_model": root / "lm", "vision_tower": root / "tower"}
    (tmp_path / "b").mkdir()
    kinds["legacy_projector"] = write_projector_only(tmp_path / "b")
    (tmp_path / "c").mkdir()
    kinds["legacy_adapter"] = write_lora(tmp_path / "c", tower_adapter=True)
    kinds["tower_adapter"] = kinds["legacy_adapter"] / "any-name"
    save_model(tiny.model, tiny.processor, tmp_path / "model")
    kinds["model"] = tmp_path / "model"
    convert_checkpoint(tmp_path / "model", tmp_path / "hf", "hf")
    kinds["hf_llava"] = tmp_path / "hf"
    for number, (kind, folder) in enumerate(kinds.items()):
        moved = tmp_path / f"folder {number}"
        shutil.copytree(folder, moved)
        assert Checkpoint.open(moved).kind == Checkpoint.open(folder).kind == kind


def test_every_tensor_has_a_status(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path, old_buffers=True)
    counts = statuses(folder)
    assert counts["computed"] == 3
    assert counts["new"] == 2  # <image>, in embeddings and head
    assert not counts["missing"] + counts["unexpected"] + counts["wrong shape"]
    text = inspection_text(inspect_checkpoint(folder))
    assert text.count("\n") > sum(counts.values())
    assert "one placeholder per image" in text
    assert "pad, layer -2, front" in text


def test_patch_tokens_and_their_ids(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path, style="patch_token", projector="linear", tower_inside=False)
    facts = inspect_checkpoint(folder).facts
    assert facts["token ids"] == "<im_patch> 261, <im_start> 262, <im_end> 263"
    assert facts["images"].startswith("square, layer -2, as written")
    assert facts["template"].startswith("vicuna_v1")
    assert statuses(folder)["new"] == 0


def test_rows_that_loading_adds_are_new(tmp_path: Path) -> None:
    """Tokens of the tokenizer without a row, tokens that loading adds, and a shorter head get new rows."""
    folder = write_legacy(tmp_path, safe=False, mm_use_im_start_end=True, mm_use_im_patch_token=True)
    head = torch.load(folder / "pytorch_model.bin")["lm_head.weight"]
    change(folder, add={"lm_head.weight": head[:-3]})
    new = [(row.ours, row.shape) for row in inspect_checkpoint(folder).rows if row.status == "new"]
    words = ["[261] (<im_patch>)", "[262] (<im_start>)", "[263] (<im_end>)", "[264] (<image>)"]
    tables = ["model.language_model.embed_tokens.weight", "lm_head.weight"]
    expected = [(table + word, (32,)) for table in tables for word in words]
    assert new == [*expected, ("lm_head.weight (further rows)", (3, 32))]
    state = load_checkpoint(folder).model.state_dict()
    assert [state[table].shape[0] for table in tables] == [265, 265]


def change(folder: Path, drop: str = "", add: dict[str, torch.Tensor] | None = None) -> None:
    state = {name: tensor for name, tensor in torch.load(folder / "pytorch_model.bin").items() if name != drop}
    write_weights(folder, {**state, **(add or {})}, safe=False, num_shards=1)


@pytest.mark.parametrize(
    ("drop", "add", "status", "name"),
    [
        ("model.layers.1.mlp.up_proj.weight", {}, "missing", "layers.1.mlp.up_proj"),
        ("", {"model_ema.decay": torch.ones(1)}, "unexpected", "model_ema.decay"),
        ("", {"model.norm.weight": torch.ones(7)}, "wrong shape", "model.norm.weight"),
    ],
)
def test_the_doctor_reports_bad_tensors(
    tmp_path: Path, drop: str, add: dict[str, torch.Tensor], status: str, name: str
) -> None:
    folder = write_legacy(tmp_path, safe=False)
    assert not errors(folder)
    change(folder, drop, add)
    assert statuses(folder)[status] == 1
    assert status in errors(folder)
    assert name in errors(folder)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tower_inside": False, "mm_vision_tower": "nowhere"}, "--vision-tower"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "around mpt"),
        ({"mm_patch_merge_type": "max_pool"}, "mm_patch_merge_type 'max_pool' is not supported"),
        ({"mm_vision_select_layer": -5}, "the tower has 3 layers, so expected -4 to 3"),
        ({"mm_vision_select_layer": 4, "tower_inside": False}, "the tower has 3 layers, so expected -4 to 3"),
        ({"s2": True}, "multi-scale"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type 'perceiver'"),
        ({"mm_vision_select_feature": "all"}, "unknown mm_vision_select_feature 'all'"),
    ],
)
def test_the_doctor_reads_settings(tmp_path: Path, options: dict[str, Any], error: str) -> None:
    folder = write_legacy(tmp_path, **options)
    assert errors(folder).count(error) == 1
    if "mm_hidden_size" not in options:  # the original code reads it; here the tower's width counts
        with pytest.raises(CheckpointError):
            load_checkpoint(folder)


def test_the_doctor_knows_the_layers_of_published_towers(tmp_path: Path) -> None:
    name = "openai/clip-vit-large-patch14-336"
    folder = write_legacy(tmp_path, tower_inside=False, mm_vision_tower=name, mm_vision_select_layer=25)
    assert "the tower has 24 layers, so expected -25 to 24" in errors(folder)


def test_a_given_tower_with_too_few_layers(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path, tower_inside=False, mm_vision_tower="somebody/tower", mm_vision_select_layer=-7)
    with pytest.raises(CheckpointError, match="mm_vision_select_layer is -7; the tower has 3 layers"):
        load_checkpoint(folder, vision_tower=str(tmp_path / "tower"))


@pytest.mark.parametrize(
    ("projector", "drop"),
    [
        *(("cluster", name) for name in ("sim_alpha", "sim_beta", "v.weight", "ln_1.bias", "mlp.2.weight")),
        *(("linear", name) for name in ("weight", "bias")),
        *(("mlp2x_gelu", name) for name in ("0.weight", "2.bias")),
    ],
)
def test_the_doctor_reports_every_missing_weight_of_a_projector(tmp_path: Path, projector: str, drop: str) -> None:
    folder = write_legacy(tmp_path, projector=projector, safe=False)
    assert not errors(folder)
    change(folder, f"model.mm_projector.{drop}")
    assert f"missing: model.multi_modal_projector.{drop}" in errors(folder)


def test_an_mlp_that_lost_a_layer_is_not_a_smaller_mlp(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path, safe=False)
    for part in ("weight", "bias"):
        change(folder, f"model.mm_projector.2.{part}")
    message = "mm_projector_type is 'mlp2x_gelu', but the weights are those of 'mlp1x_gelu'; some are missing"
    assert message in errors(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_notes_of_the_doctor(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path, model_type="llama", vocab_size=5, **OPTIONAL_KEYS)
    text = " ".join(finding.text for finding in findings(folder))
    for words in ("recognized by its mm_ keys", "a_key_of_tomorrow", "vocab_size is 5", "tower is inside"):
        assert words in text
    assert not errors(folder)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in errors(folder)


def test_the_doctor_reads_weights_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_legacy(tmp_path, safe=False)
    change(folder, add={"model.norm.weight": torch.full((32,), float("nan"))})
    assert [f.level for f in check_weights(Checkpoint.open(folder)) if "finite" in f.text] == ["error"]
    cli.main(["checkpoint", "doctor", str(folder)])
    assert "nothing keeps it from loading" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", "doctor", str(folder), "--weights"])
    assert "model.norm.weight holds values that are not finite" in capsys.readouterr().out


def test_diff_compares_across_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_legacy(tmp_path, safe=False)
    convert_checkpoint(folder, tmp_path / "again", "legacy")
    cli.main(["checkpoint", "diff", str(folder), str(tmp_path / "again")])
    out = capsys.readouterr().out
    assert out.strip().endswith("tensors are equal")
    assert len(out.splitlines()) == 1
    convert_checkpoint(folder, tmp_path / "ours", "ours")
    with pytest.raises(SystemExit) as stop:
        cli.main(["checkpoint", "diff", str(folder), str(tmp_path / "ours")])
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    tensors = [line for line in lines if not line.startswith("config.json:")]
    assert len(tensors) == 3  # both tables have one row more; then the count
    assert "shape (261, 32) and (262, 32)" in tensors[0]
    change(folder, add={"model.norm.weight": torch.ones(32) * 1.5})
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", "diff", str(folder), str(tmp_path / "again")])
    assert "model.language_model.norm.weight: largest difference 0.5, mean 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("write", [write_projector_only, write_lora])
def test_diff_pairs_projectors_and_adapters_across_formats(
    tmp_path: Path, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    is_lora = write is write_lora
    folder = write(tmp_path, tower_adapter=True) if is_lora else write(tmp_path, mm_patch_merge_type="spatial_unpad")
    if not is_lora:
        weights = {**projector_weights("mlp2x_gelu"), "model.image_newline": torch.ones(32)}
        torch.save(weights, folder / "mm_projector.bin")
    convert_checkpoint(folder, tmp_path / "ours", "ours", LoadOptions(base=str(tmp_path / "lm")))
    cli.main(["checkpoint", "diff", str(folder), str(tmp_path / "ours")])
    count = 14 if is_lora else 5
    assert capsys.readouterr().out.splitlines()[-1] == f"{count} of {count} tensors are equal"


def test_diff_splits_a_tower_under_timms_names(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shared / "oracles" / "llava-rad"
    config = Checkpoint.open(root / "out" / "stage2").config
    files = {name: str(root / config[f"mm_{name}"]) for name in ("vision_tower_config", "vision_tower_checkpoint")}
    options = LoadOptions(vision_tower=str(root / config["mm_vision_tower"]), **files)
    assert Checkpoint.open(root / "out" / "stage2").has_timm_tower
    convert_checkpoint(root / "out" / "stage2", tmp_path / "ours", "ours", options)
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", "diff", str(root / "out" / "stage2"), str(tmp_path / "ours")])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("config.json:")]
    assert [line.split(":")[0] for line in lines[:-1]] == ["lm_head.weight", "model.language_model.embed_tokens.weight"]
    assert all("shape" in line for line in lines[:-1])


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_lora(tmp_path, tower_adapter=True)
    cli.main(["checkpoint", "inspect", str(folder), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["kind"] == "legacy_adapter"
    assert content["counts"] == {"renamed": 12}
    assert content["tower adapter"] == "any-name"
    assert len(content["tensors"]) == 12


def test_one_file_alone(tmp_path: Path) -> None:
    torch.save(projector_weights("cluster"), tmp_path / "weights.bin")
    inspection = inspect_checkpoint(tmp_path / "weights.bin")
    assert inspection.checkpoint.kind == "legacy_projector"
    assert inspection.facts["projector"] == "cluster"
    write_tiny_lm(tmp_path / "lm")
    write_tiny_tower(tmp_path / "tower")
    assert Checkpoint.open(tmp_path / "tower" / "model.safetensors").kind == "vision_tower"


@pytest.mark.parametrize("to", ["model", "hf"])
@pytest.mark.parametrize("drop", ["embed_tokens.weight", "layers.1.mlp.up_proj.weight", "projector", "lm_head.weight"])
def test_the_doctor_reports_missing_weights_of_other_formats(tmp_path: Path, to: str, drop: str) -> None:
    convert_checkpoint(write_legacy(tmp_path), tmp_path / "other", to)
    assert not statuses(tmp_path / "other")["missing"]
    file = tmp_path / "other" / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if drop not in name}
    save_file(state, file, metadata={"format": "pt"})
    found = list(find_problems(inspect_checkpoint(tmp_path / "other")))
    assert any(finding.level == "error" and "missing" in finding.text for finding in found)
