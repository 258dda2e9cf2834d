"""Archives that claim to be `.bin` files: rejected in one line, and nothing large is unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from llava.errors import CheckpointError
from llava.model.checkpoint.files import torch_zip
from llava.model.checkpoint.files.torch_zip import read_bin_header


def test_a_description_that_unpacks_to_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip, "MAX_DESCRIPTION_BYTES", 1_000_000)
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x00" * 1_000_001)
    assert (tmp_path / "x.bin").stat().st_size < 5000
    with pytest.raises(CheckpointError, match=r"1000001 bytes.*not unpacked"):
        read_bin_header(tmp_path / "x.bin")


@pytest.mark.parametrize("method", [99, 8])
def test_archives_packed_in_another_way(tmp_path: Path, method: int) -> None:
    """An unknown compression method, and bytes that the stated method does not produce."""
    file = tmp_path / "x.bin"
    torch.save({"x": torch.ones(2)}, file)
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    name = member.filename.encode()
    for mark, place, before_name in ((b"PK\x03\x04", 8, 30), (b"PK\x01\x02", 10, 46)):
        start = next(
            at
            for at in range(len(content))
            if content[at : at + 4] == mark and content[at + before_name : at + before_name + len(name)] == name
        )
        content[start + place : start + place + 2] = method.to_bytes(2, "little")
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a torch file") as caught:
        read_bin_header(file)
    assert "\n" not in str(caught.value)
