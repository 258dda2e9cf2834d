"""Links of a checkpoint: what is made from it holds no file from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.errors import CheckpointError
from llava.model.checkpoint.folder import check_links
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.tools.cli import consolidate_main
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.checkpoint.tools.delta import write_delta, write_target
from llava.model.checkpoint.tools.merge_lora import merge_lora
from tests.support.legacy_folders import write_legacy, write_lora, write_projector_only

SECRET = '{"token": "of a machine"}'
REVISION, BLOB = "0" * 40, "a" * 64


def link(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, secret: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(secret)

    return make


def link_of_a_link(folder: Path, secret: Path) -> None:
    (folder / "one.json").symlink_to(secret)
    (folder / "added_tokens.json").symlink_to("one.json")


def relative_link(folder: Path, secret: Path) -> None:
    (folder / "chat.jinja").symlink_to(os.path.relpath(secret, folder))


def link_to_a_folder(folder: Path, secret: Path) -> None:
    (folder / "source").symlink_to(secret.parent, target_is_directory=True)


def link_that_looks_like_weights(folder: Path, secret: Path) -> None:
    (folder / "weights.bin").symlink_to(secret.parent, target_is_directory=True)


HOSTILE = [
    link("generation_config.json"), link("special_tokens_map.json"), link("tokenizer.model"), link("notes.txt"),
    link("source/tokenizer.json"), link("deep/er/settings.json"), link_of_a_link, relative_link, link_to_a_folder,
    link_that_looks_like_weights,
]  # fmt: skip


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "secret.json").write_text(SECRET)
    return folder / "secret.json"


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_link_out_of_a_checkpoint_is_refused_before_anything_is_written(
    tmp_path: Path, secret: Path, attack: Callable[[Path, Path], None]
) -> None:
    checkpoint = write_legacy(tmp_path)
    attack(checkpoint, secret)
    for write in (
        lambda: convert_checkpoint(checkpoint, tmp_path / "out", "hf"),
        lambda: convert_checkpoint(checkpoint, tmp_path / "out", "ours"),
        lambda: convert_checkpoint(checkpoint, tmp_path / "out", "legacy"),
        lambda: write_delta(tmp_path / "lm", checkpoint, tmp_path / "out"),
        lambda: write_target(tmp_path / "lm", checkpoint, tmp_path / "out"),
        lambda: consolidate_main(["--src", str(checkpoint), "--dst", str(tmp_path / "out")]),
    ):
        with pytest.raises(
            CheckpointError, match=r"is a link to .*, outside the checkpoint; .*replace the link"
        ) as caught:
            write()
        assert "\n" not in str(caught.value)
        assert "of a machine" not in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_link_out_of_an_adapter_is_refused(
    tmp_path: Path, secret: Path, attack: Callable[[Path, Path], None]
) -> None:
    adapter = write_lora(tmp_path)
    attack(adapter, secret)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        merge_lora(adapter, str(tmp_path / "lm"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_in_the_tower_is_refused_even_for_weights(tmp_path: Path, secret: Path) -> None:
    checkpoint = write_legacy(tmp_path)
    shutil.copytree(tmp_path / "tower", checkpoint / "tower")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "tower"}))
    (checkpoint / "tower" / "extra.safetensors").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"extra\.safetensors is a link to"):
        convert_checkpoint(checkpoint, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_the_base_of_an_adapter_is_checked_where_its_files_are_copied(tmp_path: Path, secret: Path) -> None:
    adapter = write_lora(tmp_path)
    for file in adapter.glob("*token*"):
        file.unlink()
    (tmp_path / "lm" / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "lm" / "generation_config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is a link to"):
        merge_lora(adapter, str(tmp_path / "lm"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_circular_links_pipes_and_broken_links_in_a_tower_are_left_out(tmp_path: Path) -> None:
    checkpoint = write_legacy(tmp_path)
    tower = checkpoint / "tower"
    shutil.copytree(tmp_path / "tower", tower)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "tower"}))
    (tower / "round").symlink_to("..", target_is_directory=True)
    (tower / "self").symlink_to("self")
    (tower / "gone").symlink_to("nothing")
    os.mkfifo(tower / "pipe")
    convert_checkpoint(checkpoint, tmp_path / "out", "hf")
    assert sorted(path.name for path in (tmp_path / "out" / "source" / "tower").iterdir()) == sorted(
        path.name for path in (tmp_path / "tower").iterdir()
    )


def test_links_inside_a_checkpoint_and_of_weights_are_followed(tmp_path: Path) -> None:
    checkpoint = write_legacy(tmp_path)
    (tmp_path / "disk").mkdir()
    weights = checkpoint / "model.safetensors"
    weights.rename(tmp_path / "disk" / "model.safetensors")
    weights.symlink_to(tmp_path / "disk" / "model.safetensors")
    (checkpoint / "tokenizer.json").rename(checkpoint / "real.json")
    (checkpoint / "tokenizer.json").symlink_to("real.json")
    written = convert_checkpoint(checkpoint, tmp_path / "out", "ours")
    assert written.kind == "model"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("to", ["hf", "ours", "legacy"])
def test_a_snapshot_of_the_hub_cache_converts(tmp_path: Path, to: str) -> None:
    checkpoint = write_legacy(tmp_path)
    entry = tmp_path / "cache" / "models--clinic--model"
    snapshot = entry / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copyfile(file, entry / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    convert_checkpoint(snapshot, tmp_path / "out", to)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert Checkpoint.open(tmp_path / "out").has_tokenizer


def test_a_folder_that_is_itself_a_link_converts(tmp_path: Path) -> None:
    checkpoint = write_legacy(tmp_path)
    (tmp_path / "latest").symlink_to(checkpoint, target_is_directory=True)
    assert convert_checkpoint(tmp_path / "latest", tmp_path / "out", "ours").kind == "model"


def test_a_single_file_says_nothing_about_its_folder(tmp_path: Path, secret: Path) -> None:
    stage1 = write_projector_only(tmp_path)
    link("other.json")(stage1, secret)
    check_links(stage1 / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        check_links(stage1)


def test_files_that_a_configuration_names_as_a_tower_are_copied_only_if_they_are_one(
    tmp_path: Path, secret: Path
) -> None:
    adapter = write_lora(tmp_path)
    config = json.loads((adapter / "config.json").read_text())
    named = {
        "mm_vision_tower": "hf-hub:any/tower",
        "mm_vision_tower_config": str(secret),
        "mm_vision_tower_checkpoint": str(secret),
    }
    (adapter / "config.json").write_text(json.dumps({**config, **named}))
    with pytest.raises((CheckpointError, ValueError)) as caught:
        merge_lora(adapter, str(tmp_path / "lm"), tmp_path / "out", include_tower=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
