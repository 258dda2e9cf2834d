"""Commands that write on a full or a read-only disk end in one line that names the file, and go on afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.cli import main
from llava.model.checkpoint.save import save_model
from tests.support.disks import make_read_only, small_disk
from tests.support.tiny import tiny_llava, write_tiny_vqa

COMMANDS: dict[str, list[str]] = {
    "eval": ["eval", "--model", "MODEL", "--data", "VQA/two.json", "--image-folder", "VQA/images", "--out", "DISK/a",
             "--controls", "none", "--device", "cpu", "--max-new-tokens", "2", "--num-resamples", "2"],
    "convert": ["checkpoint", "convert", "MODEL", "DISK/a", "--to", "legacy"],
    "export": ["checkpoint", "export", "MODEL", "DISK/a/b", "--to", "hf"],
    "split": ["data", "split", "VQA/train.json", "--by", "image", "--fractions", "train=0.5,test=0.5",
              "--out", "DISK/a"],
    "check, page": ["data", "check", "VQA/train.json", "--html", "DISK/a.html"],
    "check, table": ["data", "check", "VQA/train.json", "--json", "DISK/a.json"],
    "check, copy": ["data", "check", "VQA/train.json", "--fix", "DISK/a.json"],
    "show": ["data", "show", "VQA/train.json", "--row", "0", "--model", "MODEL", "--html", "DISK/a.html"],
    "train": ["train", "--model-name-or-path", "MODEL", "--data-path", "VQA/two.json", "--image-folder", "VQA/images",
              "--output-dir", "DISK/a", "--max-steps", "1", "--report-to", "none", "--bf16", "False"],
}  # fmt: skip
"""Commands by name; `DISK/a` is what they write."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = tiny_llava(projector_type="mlp2x_gelu")
    folder = tmp_path_factory.mktemp("parts")
    save_model(loaded.model, loaded.processor, folder / "model", origin=loaded.origin)
    write_tiny_vqa(folder / "vqa")
    rows = json.loads((folder / "vqa" / "train.json").read_text())
    (folder / "vqa" / "two.json").write_text(json.dumps(rows[:2]))
    return folder


def words(name: str, model: Path, disk: Path) -> list[str]:
    places = {"MODEL": model / "model", "VQA": model / "vqa", "DISK": disk}
    return ["/".join(str(places.get(part, part)) for part in word.split("/")) for word in COMMANDS[name]]


def error_of(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which a command ends."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    shown = capfd.readouterr().err
    [line] = [line for line in shown.splitlines() if "error" in line.lower()]
    assert ended.value.code == 2 and "Traceback" not in shown
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    model: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        with (disk / "filler").open("wb") as stream, pytest.raises(OSError, match="No space"):
            stream.write(b"\x00" * (5 << 20))
            stream.flush()
        line = error_of(words(name, model, disk), capfd)
        assert line.startswith(f"llava: error: {disk}/a") and "cannot be written: the disk is full; free space" in line
        assert {path.name for path in disk.iterdir()} <= {"filler", "a"}
        (disk / "filler").unlink()
        succeed(words(name, model, disk))
        assert [path.name for path in disk.iterdir() if path.name.startswith(".")] == []


def succeed(argv: list[str]) -> None:
    try:
        main(argv)
    except SystemExit as ended:
        assert ended.code in (0, None)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_disk_is_named(model: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        make_read_only(disk)
        line = error_of(words(name, model, disk), capfd)
    assert line.startswith(f"llava: error: {disk}/a") and f"the folder {disk} is read-only" in line
