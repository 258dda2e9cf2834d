"""Rows of shards: every format, from any row on, and damaged files."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.shards import StreamRow, rows_in
from llava.errors import DataError
from tests.support.tiny import tiny_image

NUM_ROWS = 5


def image_bytes(number: int) -> bytes:
    buffer = io.BytesIO()
    tiny_image(number).save(buffer, format="PNG")
    return buffer.getvalue()


def turns(number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"Question {number}?"}, {"from": "gpt", "value": f"Answer {number}."}]


def rows() -> list[dict[str, Any]]:
    return [{"id": str(number), "conversations": turns(number)} for number in range(NUM_ROWS)]


def write_lines(path: Path) -> Path:
    path.write_text("\n".join(json.dumps({**row, "image": f"{row['id']}.png"}) for row in rows()) + "\n\n")
    return path


def write_gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress(write_lines(path).read_bytes()))
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for number, row in enumerate(rows()):
            add(archive, f"part/{number:06d}.json", json.dumps({**row, "image": "elsewhere.png"}).encode())
            add(archive, f"part/{number:06d}.png", image_bytes(number))
    return path


def write_parquet(path: Path) -> Path:
    import datasets

    table = {"id": [], "conversations": [], "scan": []}  # type: dict[str, list[Any]]
    for number, row in enumerate(rows()):
        table["id"].append(row["id"])
        table["conversations"].append(row["conversations"])
        table["scan"].append({"bytes": image_bytes(number), "path": None})
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            "scan": datasets.Image(),
        }
    )
    datasets.Dataset.from_dict(table, features=features).to_parquet(path)
    return path


WRITERS = {"lines": write_lines, "gzip": write_gzip, "tar": write_tar, "parquet": write_parquet}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("start", [0, 3, NUM_ROWS])
def test_rows_from_any_row_on(tmp_path: Path, kind: str, start: int) -> None:
    shard = WRITERS[kind](tmp_path / "shard")
    found = list(rows_in(shard, start))
    assert [number for number, _ in found] == list(range(start, NUM_ROWS))
    for number, row in found:
        assert isinstance(row, StreamRow)
        assert row.value["conversations"] == turns(number) and row.value["id"] == str(number)
        holds = kind in ("tar", "parquet")
        assert row.images == ((image_bytes(number),) if holds else ())
        assert ("image" in row.value) == (not holds)


def test_a_compressed_tar_and_shards_of_the_library(tmp_path: Path) -> None:
    plain, packed = write_tar(tmp_path / "plain"), write_tar(tmp_path / "packed", "w:gz")
    assert list(rows_in(plain)) == list(rows_in(packed))
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for number, row in enumerate(rows()):
            writer.write({"__key__": f"part/{number:06d}", "json": row, "png": image_bytes(number)})
    assert [row for _, row in rows_in(tmp_path / "theirs.tar")] == [row for _, row in rows_in(plain)]


def test_several_images_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in ("10.png", "2.png", "0.png"):
            add(archive, f"a.{name}", name.encode())
        add(archive, "a.json", b'{"conversations": []}')
    [(_, row)] = rows_in(tmp_path / "shard.tar")
    assert isinstance(row, StreamRow) and row.images == (b"0.png", b"2.png", b"10.png") and row.value["id"] == "a"


def test_members_that_are_no_images_are_left_alone(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        add(archive, "._a.json", b"\x00\x05\x16\x07 macOS")
        add(archive, "a.json", b'{"id": "a", "image": "elsewhere.png"}')
        add(archive, "._a.png", b"\x00\x05\x16\x07 macOS")
        add(archive, "a.cls", b"3")
        add(archive, "a.txt", b"a caption")
        add(archive, "a.png", image_bytes(1))
        add(archive, "a.seg", image_bytes(2))
        add(archive, "b.json", b'{"id": "b", "image": "elsewhere.png"}')
        add(archive, "b.txt", b"a caption")
        add(archive, "c.json", b'{"id": "c"}')
        add(archive, "c.jpg", b"broken")
    found = [row for _, row in rows_in(tmp_path / "shard.tar")]
    assert found == [
        StreamRow({"id": "a"}, (image_bytes(1), image_bytes(2))),
        StreamRow({"id": "b", "image": "elsewhere.png"}),
        StreamRow({"id": "c"}, (b"broken",)),
    ]


def test_two_members_of_one_name_are_an_error_in_their_place(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in ("a.json", "a.png", "a.PNG", "b.json", "b.json", "c.json"):
            add(archive, name, b"{}")
    found = [row for _, row in rows_in(tmp_path / "shard.tar")]
    assert "duplicate member a.png" in str(found[0]) and "duplicate member b.json" in str(found[1])
    assert found[2] == StreamRow({"id": "c"}) and len(list(rows_in(tmp_path / "shard.tar", 2))) == 1


def test_headers_of_a_long_shard_are_not_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for number in range(4000):
            add(archive, f"{number}.json", b"{}")
    tracemalloc.start()
    assert sum(1 for _ in rows_in(tmp_path / "shard.tar")) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # 4000 headers are 3 MB


def test_bad_rows_are_errors_in_their_place(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"id": "0"}\nnot JSON\n[1]\n{"id": "3"}\n')
    kinds = [type(row) for _, row in rows_in(tmp_path / "lines")]
    assert kinds == [StreamRow, DataError, DataError, StreamRow]
    with tarfile.open(tmp_path / "tar", "w") as archive:
        add(archive, "a.png", b"x")
        add(archive, "b.json", b"{")
        add(archive, "c.json", b"{}")
    found = [row for _, row in rows_in(tmp_path / "tar")]
    assert "member a.json is missing; found png" in str(found[0]) and "not JSON" in str(found[1])
    assert found[2] == StreamRow({"id": "c"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"id": 1}]', "a JSON array cannot be streamed"),
        (b"\x89PNG", "neither JSON lines"),
        (b"PAR1 and no more", "damaged or truncated"),
        (gzip.compress(b"{}" * 900, mtime=0)[:30], "damaged or truncated"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "shard").write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(rows_in(tmp_path / "shard"))
    with pytest.raises(DataError, match="cannot be read"):
        list(rows_in(tmp_path / "none"))


def test_a_tar_shard_that_is_cut_or_damaged_anywhere_loses_no_row_silently(tmp_path: Path) -> None:
    """A truncated or damaged header is an error; the library silently ends there, unless it is the first one."""
    content = write_tar(tmp_path / "whole").read_bytes()
    with tarfile.open(tmp_path / "whole") as archive:
        place = archive.getmembers()[4].offset
    damaged = {
        "between members": content[:place],
        "in a header": content[: place + 100],
        "header overwritten": content[:place] + b"\x55" * 512 + content[place + 512 :],
        "header zeroed": content[:place] + bytes(1024) + content[place + 1024 :],
        "two archives in a row": content + content,
    }
    for name, data in damaged.items():
        for packed in (data, gzip.compress(data, mtime=0)):
            (tmp_path / name).write_bytes(packed)
            with pytest.raises(DataError, match="damaged or truncated"):
                list(rows_in(tmp_path / name))
    packed = gzip.compress(content)
    (tmp_path / "checksum").write_bytes(packed[:-8] + b"1234" + packed[-4:])
    with pytest.raises(DataError, match="CRC"):
        list(rows_in(tmp_path / "checksum"))


def test_lines_with_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    text = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows()) + "\r\n"
    (tmp_path / "windows").write_bytes(text.encode())
    found = [row for _, row in rows_in(tmp_path / "windows")]
    assert [isinstance(row, StreamRow) and row.value["id"] for row in found] == [str(n) for n in range(NUM_ROWS)]


def test_names_with_signs_of_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "[v1] ü*"
    folder.mkdir()
    assert len(list(rows_in(write_parquet(folder / "part[0].parquet")))) == NUM_ROWS


@pytest.mark.parametrize("kind", ["lines", "gzip", "tar"])
@settings(deadline=None)
@given(cut=st.integers(0, 10_000), flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4))
def test_mutated_shards_end_in_named_errors(
    tmp_path_factory: pytest.TempPathFactory, kind: str, cut: int, flips: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    content = bytearray(WRITERS[kind](folder / kind).read_bytes()[: cut or None])
    for place, value in flips:
        if place < len(content):
            content[place] = value
    (folder / "mutated").write_bytes(content)
    with contextlib.suppress(DataError):
        assert all(isinstance(row, StreamRow | DataError) for _, row in rows_in(folder / "mutated"))
