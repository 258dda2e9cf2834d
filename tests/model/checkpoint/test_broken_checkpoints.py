"""Broken and hostile checkpoints: one line of error, nothing run, nothing written."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava import cli
from llava.errors import LlavaError
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.tools.convert import convert_checkpoint
from tests.support.legacy_folders import write_legacy, write_lora, write_projector_only, write_weights
from tests.support.tiny import write_tiny_lm

VICTIM = "victim"


class Attack:
    """Object that writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (str(self.target), "w")


def cut(folder: Path) -> None:
    file = next(file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin"))
    file.write_bytes(file.read_bytes()[:-500])


def drop_shard(folder: Path) -> None:
    next(iter(folder.glob("*-00002-of-*"))).unlink()


def put_code_inside(folder: Path) -> None:
    file = next(iter(folder.glob("*.bin")))
    torch.save({**torch.load(file), "extra": Attack(folder / VICTIM)}, file)


def wrong_shape(folder: Path) -> None:
    file = next(iter(folder.glob("*.bin")))
    torch.save({**torch.load(file), "model.norm.weight": torch.ones(7)}, file)


def lose_a_tensor(folder: Path) -> None:
    file = next(iter(folder.glob("*.bin")))
    torch.save({name: tensor for name, tensor in torch.load(file).items() if "up_proj" not in name}, file)


def add_a_stranger(folder: Path) -> None:
    file = next(iter(folder.glob("*.bin")))
    torch.save({**torch.load(file), "critic.weight": torch.ones(7)}, file)


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"mm_vision_tower": ')


def set_key(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, key: value}))

    return change


def assert_rejected(source: Path, work: Path, message: str, **options: Any) -> None:
    """Check that loading, converting and exporting all fail with one line, and leave nothing."""
    before = sorted(str(file) for file in work.rglob("*"))
    with pytest.raises(LlavaError, match=message) as caught:
        load_checkpoint(source, **options)
    assert "\n" not in str(caught.value)
    for to in ("ours", "legacy", "hf"):
        with pytest.raises(LlavaError, match=message) as caught:
            convert_checkpoint(source, work / "out", to, LoadOptions(**options))
        assert "\n" not in str(caught.value)
    assert sorted(str(file) for file in work.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ({}, cut, "truncated"),
        ({"safe": False}, cut, "truncated"),
        ({"num_shards": 3}, cut, "truncated"),
        ({"num_shards": 3}, drop_shard, "missing shard"),
        ({"num_shards": 3, "safe": False}, drop_shard, "missing shard"),
        ({"safe": False}, put_code_inside, "holds code"),
        ({"safe": False}, wrong_shape, "weights do not fit the model: 1 mismatched_keys"),
        ({"safe": False}, lose_a_tensor, "weights do not fit the model: 2 missing_keys"),
        ({"safe": False}, add_a_stranger, "critic.weight belongs to no part"),
        ({}, break_config, "config.json cannot be read as JSON"),
        ({}, set_key("hidden_size", "wide"), "config.json"),
        ({}, set_key("mm_vision_tower", "nowhere"), "--vision-tower"),
        ({}, set_key("mm_vision_select_feature", "all"), "mm_vision_select_feature"),
        ({}, set_key("mm_patch_merge_type", "spatial_unpad"), "1 missing_keys such as model.image_newline"),
        ({}, set_key("mm_patch_merge_type", "max_pool"), "mm_patch_merge_type"),
        ({}, set_key("image_aspect_ratio", "anyres_max_9"), "unknown image mode"),
        ({}, set_key("architectures", ["LlavaMptForCausalLM"]), "around mpt"),
        ({}, set_key("s2", True), "multi-scale"),
    ],
)
def test_whole_models(tmp_path: Path, kind: dict[str, Any], change: Callable[[Path], None], message: str) -> None:
    folder = write_legacy(tmp_path, **kind)
    change(folder)
    assert_rejected(folder, tmp_path, message)
    assert not (folder / VICTIM).exists()


@pytest.mark.parametrize("write", [write_lora, write_projector_only])
def test_parts_without_their_base(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    folder = write(tmp_path)
    assert_rejected(folder, tmp_path, "--model-base")
    assert_rejected(folder, tmp_path, "needs the plain language model", base=str(tmp_path / "tower"))


def test_parts_on_the_wrong_base(tmp_path: Path) -> None:
    folder = write_lora(tmp_path)
    wide = write_tiny_lm(tmp_path / "wide", intermediate_size=96)
    assert_rejected(folder, tmp_path, "does not fit|do not fit", base=str(wide))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "non_lora_trainables.bin"])
def test_an_adapter_without_one_of_its_files(tmp_path: Path, name: str) -> None:
    folder = write_lora(tmp_path)
    (folder / name).unlink()
    assert_rejected(folder, tmp_path, "no weights|non_lora_trainables", base=str(tmp_path / "lm"))


def test_code_in_the_files_of_an_adapter(tmp_path: Path) -> None:
    folder = write_lora(tmp_path, safe=False)
    for name in ("adapter_model.bin", "non_lora_trainables.bin"):
        content = torch.load(folder / name)
        torch.save({**content, "extra": Attack(tmp_path / VICTIM)}, folder / name)
        assert_rejected(folder, tmp_path, "holds code", base=str(tmp_path / "lm"))
        torch.save(content, folder / name)
    assert not (tmp_path / VICTIM).exists()


def test_a_projector_of_another_kind(tmp_path: Path) -> None:
    folder = write_projector_only(tmp_path)
    torch.save({"model.mm_projector.gate": torch.ones(2)}, folder / "mm_projector.bin")
    assert_rejected(folder, tmp_path, "no known projector", base=str(tmp_path / "lm"))


def test_the_command_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_legacy(tmp_path, safe=False)
    put_code_inside(folder)
    capsys.readouterr()
    for words in (["inspect"], ["doctor"], ["convert", str(tmp_path / "out")], ["export", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["checkpoint", words[0], str(folder), *words[1:]])
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("llava: error: ")
        assert "holds code" in printed.err.splitlines()[0]
        assert not printed.out
    assert not (folder / VICTIM).exists()
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_not_written_into(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(LlavaError, match="not empty"):
        convert_checkpoint(folder, tmp_path / "full", "ours")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_zip_that_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path, safe=False)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert_rejected(folder, tmp_path, "without tensors")


def test_a_training_checkpoint_with_its_state_inside(tmp_path: Path) -> None:
    """Trainers wrap the table: the table is read, other plain values are ignored, and nothing is run."""
    folder = write_legacy(tmp_path, safe=False)
    state = torch.load(folder / "pytorch_model.bin")
    torch.save({"state_dict": state, "epoch": 3}, folder / "pytorch_model.bin")
    expected = {name: tensor.clone() for name, tensor in load_checkpoint(folder).model.state_dict().items()}
    write_weights(folder, state, safe=False, num_shards=1)
    plain = load_checkpoint(folder).model.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in expected.items())
