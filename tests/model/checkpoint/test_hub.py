"""Checkpoints by hub name, from the hub client's cache."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants

from llava import cli
from llava.errors import CheckpointError
from llava.model.checkpoint.hub import DUPLICATE_FILES, _not_needed, is_hub_name, is_hub_reachable, local_folder
from llava.model.checkpoint.load import load_checkpoint
from tests.support.legacy_folders import write_legacy
from tests.support.runs import arguments, train, write_parts

REVISION = "0" * 40


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a legacy checkpoint that the cache holds as `clinic/model`, without a network."""
    folder = write_legacy(tmp_path)
    entry = tmp_path / "cache" / "models--clinic--model"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(REVISION)
    shutil.copytree(folder, entry / "snapshots" / REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def test_a_name_loads_as_its_folder_does(cached: Path) -> None:
    by_name, by_path = load_checkpoint("clinic/model").model.state_dict(), load_checkpoint(cached).model.state_dict()
    assert by_name.keys() == by_path.keys()
    assert all(torch.equal(tensor, by_name[name]) for name, tensor in by_path.items())


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_a_name_is_inspected_as_its_folder_is(command: str, cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for place in ("clinic/model", str(cached)):
        with contextlib.suppress(SystemExit):
            cli.main(["checkpoint", command, place])
        printed.append(capsys.readouterr().out.splitlines()[1:])
    assert printed[0] == printed[1] and len(printed[0]) > 1


def test_a_name_is_compared_and_converted(cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["checkpoint", "diff", "clinic/model", str(cached)])
    compared = capsys.readouterr().out
    assert "only in" not in compared and " tensors are equal" in compared
    cli.main(["checkpoint", "convert", "clinic/model", str(tmp_path / "converted")])
    assert (tmp_path / "converted" / "config.json").is_file()


def test_training_continues_from_a_name(cached: Path, tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    train(arguments(parts, tmp_path / "run", model_name_or_path="clinic/model", vision_tower=None, max_steps=1))
    assert load_checkpoint(tmp_path / "run").model.config.projector_type == "mlp2x_gelu"


def test_a_missing_repository_is_one_line(cached: Path) -> None:
    with pytest.raises(CheckpointError, match="clinic/other is not a folder, and cannot be downloaded") as caught:
        load_checkpoint("clinic/other")
    assert "\n" not in str(caught.value)


def test_a_mistyped_folder_is_named_at_once_where_no_hub_can_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown_host(*_: object) -> None:
        raise OSError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.getaddrinfo", unknown_host)
    monkeypatch.setattr("llava.model.checkpoint.hub.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(HfApi, "list_repo_files", unknown_host)
    Path("runs/first").mkdir(parents=True)
    message = "runs/frist is not a folder; did you mean first[?], and cannot be downloaded from the hub: it cannot be"
    with pytest.raises(CheckpointError, match=message):
        local_folder("runs/frist")
    monkeypatch.setattr("llava.model.checkpoint.hub.getproxies", lambda: {"https": "http://proxy:3128"})
    assert is_hub_reachable()  # the proxy resolves the name


@pytest.mark.parametrize(
    ("path", "expected"),
    [("clinic/model", True), ("model", True), ("/runs/first", False), ("./runs/first/x", False), (Path.cwd(), False)],
)
def test_folders_are_not_hub_names(path: str | Path, expected: bool) -> None:
    assert is_hub_name(path) is expected


@pytest.mark.parametrize(
    ("files", "skipped"),
    [
        (["model.safetensors", "pytorch_model.bin"], DUPLICATE_FILES),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], DUPLICATE_FILES),
        (["pytorch_model.bin", "mm_projector.safetensors"], ()),
        (["pytorch_model.bin", "tower/model.safetensors"], ()),
        (["pytorch_model.bin", "model-00001-of-00002.safetensors"], ()),
    ],
)
def test_bin_weights_are_skipped_only_if_they_are_duplicates(
    files: list[str], skipped: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, name: files)
    assert _not_needed("clinic/model") == skipped
