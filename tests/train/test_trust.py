"""A checkpoint whose loaders unpickle is resumed only where it was written, or when it is trusted explicitly."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from llava.errors import CheckpointError
from llava.train.checkpointing import last_checkpoint
from llava.train.trust import check_mark, key_file, make_key, write_mark

FILES = {
    "trainer_state.json": b'{"global_step": 2}',
    "latest": b"global_step2",
    "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"states" * 100,
    "global_step2/mp_rank_00_model_states.pt": b"weights",
    "pytorch_model_fsdp_0/.metadata": b"\x80\x04N.",
    "optimizer_0/__0_0.distcp": b"",
}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A marked checkpoint of files that nothing here loads."""
    monkeypatch.setenv("LLAVA_KEY_FILE", str(tmp_path / "home" / "checkpoint.key"))
    folder = tmp_path / "run" / "checkpoint-2"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_mark(folder)
    return folder


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_mark(checkpoint)
    text = str(caught.value)
    assert text.isprintable() and str(checkpoint) in text and "--trust-checkpoint True" in text
    return text


def test_a_checkpoint_is_resumed_where_it_was_written(checkpoint: Path, tmp_path: Path) -> None:
    check_mark(checkpoint)
    check_mark(shutil.copytree(checkpoint, tmp_path / "moved" / "checkpoint-2"))
    write_mark(checkpoint)
    check_mark(checkpoint)


def test_the_key_is_private_and_outside_of_the_run(checkpoint: Path) -> None:
    assert key_file().stat().st_mode & 0o777 == 0o600
    assert not key_file().is_relative_to(checkpoint.parent)
    key = make_key(key_file())
    assert make_key(key_file()) == key and len(key) == 32
    for file in checkpoint.rglob("*"):
        assert not file.is_file() or (key not in file.read_bytes() and key.hex() not in file.read_text("latin-1"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["content", "longer", "removed", "renamed", "link", "hidden link"])
def test_a_changed_file_is_refused(checkpoint: Path, tmp_path: Path, name: str, change: str) -> None:
    file = checkpoint / name
    content = file.read_bytes()
    if change == "content" and content:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif change in ("content", "longer"):
        file.write_bytes(content + b"\x00")
    elif change == "removed":
        file.unlink()
    elif change == "renamed":
        file.rename(file.with_name("other"))
    elif change == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere")
    else:
        (file.parent / "extra").symlink_to(tmp_path)
    with pytest.raises(CheckpointError):
        check_mark(checkpoint)
    if change == "content":
        assert file.name in refusal(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "extra.pt",
        "global_step2/extra.pt",
        "global_step3/x.pt",
        "written_here-x.txt",
        "global_step2/written_here-a.json",
    ],
)
def test_an_added_file_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"\x80\x04N.")
    assert "was added" in refusal(checkpoint)


def mark_of(checkpoint: Path) -> Path:
    (mark,) = checkpoint.glob("written_here-*.json")
    return mark


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"files": {}, "hmac": 3}', '{"files": [], "hmac": ""}', "[" * 5000, "\x00"]
)
def test_a_forged_mark_is_refused(checkpoint: Path, content: str) -> None:
    mark_of(checkpoint).write_text(content)
    assert "was not made with" in refusal(checkpoint)


def test_a_mark_covers_its_table(checkpoint: Path) -> None:
    """Whoever changes a file cannot write its new hash into the mark."""
    (checkpoint / "latest").write_text("../../evil")
    mark = mark_of(checkpoint)
    content = json.loads(mark.read_text())
    other = checkpoint.with_name("checkpoint-3")
    shutil.copytree(checkpoint, other)
    write_mark(other)  # its own table, signed with the key, belongs to other files only
    content["files"] = json.loads(mark_of(other).read_text())["files"]
    mark.write_text(json.dumps(content))
    assert "was not made with" in refusal(checkpoint)


def test_another_machine_or_user_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_KEY_FILE", str(tmp_path / "none.key"))
    assert "no mark" in refusal(checkpoint)
    make_key(tmp_path / "none.key")
    assert "no mark" in refusal(checkpoint)
    stolen = mark_of(checkpoint)
    write_mark(checkpoint)  # a second machine marks too: both may resume
    assert len(list(checkpoint.glob("written_here-*.json"))) == 2
    check_mark(checkpoint)
    monkeypatch.setenv("LLAVA_KEY_FILE", str(tmp_path / "home" / "checkpoint.key"))
    check_mark(checkpoint)
    assert stolen.is_file()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o666])
def test_a_key_that_others_can_use_is_refused(checkpoint: Path, mode: int) -> None:
    key_file().chmod(mode)
    with pytest.raises(CheckpointError, match="chmod 600"):
        check_mark(checkpoint)


@pytest.mark.parametrize("content", [b"", b"00" * 31, b"zz" * 32, bytes(range(200, 232)), b"00" * 64])
def test_a_broken_key_is_refused(checkpoint: Path, content: bytes) -> None:
    key_file().write_bytes(content)
    with pytest.raises(CheckpointError, match="holds no key"):
        check_mark(checkpoint)


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_key_that_is_no_file_is_refused(checkpoint: Path, kind: str) -> None:
    key_file().rename(moved := key_file().with_name("moved"))
    if kind == "link":
        key_file().symlink_to(moved)
    elif kind == "folder":
        key_file().mkdir()
    else:
        os.mkfifo(key_file(), 0o600)
    with pytest.raises(CheckpointError):
        check_mark(checkpoint)


def test_without_a_place_for_the_key_training_continues(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mark_of(checkpoint).unlink()
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAVA_KEY_FILE", str(tmp_path / "file" / "checkpoint.key"))
    write_mark(checkpoint)
    assert "cannot be marked" in caplog.text and not list(checkpoint.glob("written_here-*"))


def test_the_place_of_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLAVA_KEY_FILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert key_file() == tmp_path / "llava" / "checkpoint.key"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert key_file() == tmp_path / ".config" / "llava" / "checkpoint.key"


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_planted_call_is_refused_before_it_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    target = checkpoint / "global_step2" / "mp_rank_00_model_states.pt"
    torch.save(Planted(str(tmp_path / "ran")), target)
    assert "mp_rank_00_model_states.pt" in refusal(checkpoint)
    assert not (tmp_path / "ran").exists()


WRITTEN: dict[str, tuple[dict[int, str], bool, int | None]] = {
    "killed before its mark": ({2: "ours", 4: "whole"}, True, 2),
    "two that lack their mark": ({2: "ours", 4: "whole", 6: "whole"}, True, 2),
    "killed before its state": ({2: "ours", 4: "torn"}, True, 2),
    "a mark of another machine is refused later": ({2: "ours", 4: "theirs"}, True, 4),
    "without any mark the newest is refused later": ({2: "whole", 4: "whole"}, True, 4),
    "all are marked": ({2: "ours", 4: "ours", 10: "ours"}, True, 10),
    "not sharded, or trusted": ({2: "ours", 4: "whole"}, False, 4),
    "nothing is complete": ({2: "torn"}, True, None),
}
"""Checkpoints by step, whether marks are needed, and the step that is resumed."""


@pytest.mark.parametrize("name", WRITTEN)
def test_a_checkpoint_that_was_being_written_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kinds, needs_mark, expected = WRITTEN[name]
    for step, kind in kinds.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"glo' if kind == "torn" else json.dumps({"global_step": step}))
        monkeypatch.setenv("LLAVA_KEY_FILE", str(tmp_path / f"{kind}.key"))
        if kind in ("ours", "theirs"):
            write_mark(folder)
    found = last_checkpoint(tmp_path, needs_mark=needs_mark)
    assert found == (None if expected is None else tmp_path / f"checkpoint-{expected}")
