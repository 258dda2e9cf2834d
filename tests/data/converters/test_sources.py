"""Unpacking of archives: content, and that no member leaves the folder or exceeds the limits."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.data.converters.sources import FINISHED, is_archive, unpack_archive
from llava.data.download.archives import ArchiveLimits
from llava.errors import ArchiveError, DataError


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def make_tgz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


MAKERS = {"a.zip": make_zip, "a.tgz": make_tgz}


@pytest.mark.parametrize("name", MAKERS)
def test_members_come_out_once(tmp_path: Path, name: str) -> None:
    archive = MAKERS[name](tmp_path / name, {"in/x.txt": b"one", "./y.txt": b"two"})
    folder = unpack_archive(archive, tmp_path / "out")
    assert (folder / "in/x.txt").read_bytes() == b"one" and (folder / "y.txt").read_bytes() == b"two"
    (folder / "y.txt").unlink()
    unpack_archive(archive, tmp_path / "out")
    assert not (folder / "y.txt").exists()  # already unpacked, so nothing is done
    (folder / FINISHED).unlink()
    assert (unpack_archive(archive, tmp_path / "out") / "y.txt").exists()
    assert is_archive(archive) and not is_archive(folder / "y.txt")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("member", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", FINISHED])
def test_no_member_leaves_the_folder(tmp_path: Path, name: str, member: str) -> None:
    archive = MAKERS[name](tmp_path / name, {"good": b"x", member: b"y"})
    with pytest.raises(ArchiveError, match="outside the folder") as caught:
        unpack_archive(archive, tmp_path / "deep" / "out")
    assert caught.value.reason == "unsafe_member" and str(archive) in str(caught.value)
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "deep" / "out" / FINISHED).exists()


def test_links_are_not_made(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        member = zipfile.ZipInfo("link")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(member, "/etc/passwd")
    with pytest.raises(ArchiveError, match="link or device"):
        unpack_archive(tmp_path / "a.zip", tmp_path / "out")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [path.name for path in unpack_archive(tmp_path / "a.tgz", tmp_path / "out2").iterdir()] == [FINISHED]


@pytest.mark.parametrize("name", MAKERS)
def test_bombs_do_not_fit(tmp_path: Path, name: str) -> None:
    archive = MAKERS[name](tmp_path / name, {"zeros": bytes(1 << 20)})
    with pytest.raises(ArchiveError) as caught:
        unpack_archive(archive, tmp_path / "out", ArchiveLimits(ratio_from=1 << 16, max_ratio=50))
    assert caught.value.reason == "bomb"


def test_a_file_and_a_folder_of_one_name(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"x": b"1", "x/y": b"2"})
    with pytest.raises(ArchiveError, match="two members have the path"):
        unpack_archive(archive, tmp_path / "out")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.sampled_from(sorted(MAKERS)), st.binary(min_size=1, max_size=40), st.integers(0, 400))
def test_damaged_archives_give_a_named_error(tmp_path: Path, name: str, noise: bytes, place: int) -> None:
    archive = MAKERS[name](tmp_path / name, {"a/x.txt": b"one" * 50, "b.txt": b"two"})
    data = bytearray(archive.read_bytes())
    place = min(place, len(data) - 1)
    data[place : place + len(noise)] = noise
    archive.write_bytes(bytes(data))
    try:
        unpack_archive(archive, tmp_path / "deep" / "out")
    except DataError as error:
        assert name in str(error) or "out" in str(error)
    assert {path.name for path in tmp_path.iterdir()} <= {"deep", *MAKERS}
