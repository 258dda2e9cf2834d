"""Headers without torch, reading tensor by tensor, writing shards, and broken files."""

from __future__ import annotations

import json
import pickle
import pickletools
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import CheckpointError
from llava.model.checkpoint.files import shard_writer
from llava.model.checkpoint.files.shard_writer import ShardWriter
from llava.model.checkpoint.files.shards import TensorReader, list_tensors, open_tensors, read_with_room

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor(1.5, dtype=torch.bfloat16),
    "c.half": torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).half(),
    "d.empty": torch.zeros(0, 7),
    "e.ids": torch.arange(6),
}


def write(folder: Path, *, safe: bool, max_shard_bytes: int = 10**9) -> Path:
    with ShardWriter(folder, max_shard_bytes=max_shard_bytes, safe=safe) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    return folder


def assert_same(reader: TensorReader, expected: dict[str, torch.Tensor] = TENSORS) -> None:
    assert set(reader.names) == set(expected)
    for name, tensor in reader:
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 60, 1])
def test_round_trip(tmp_path: Path, safe: bool, max_shard_bytes: int) -> None:
    write(tmp_path, safe=safe, max_shard_bytes=max_shard_bytes)
    with open_tensors(tmp_path) as reader:
        assert_same(reader)
    entries = list_tensors(tmp_path)
    assert {name: (entry.shape, "torch." + entry.dtype) for name, entry in entries.items()} == {
        name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in TENSORS.items()
    }
    assert sum(entry.num_bytes for entry in entries.values()) == sum(t.nbytes for t in TENSORS.values())
    num_files = len({entry.file for entry in entries.values()})
    assert (num_files == 1) == (max_shard_bytes == 10**9)
    assert bool(list(tmp_path.glob("*.index.json"))) == (num_files > 1)
    assert not list(tmp_path.glob(".saving-*"))


def test_transformers_and_safetensors_read_what_is_written(tmp_path: Path) -> None:
    write(tmp_path, safe=True)
    content = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(content[name], tensor) for name, tensor in TENSORS.items())
    write(tmp_path / "bin", safe=False)
    content = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(content[name], tensor) for name, tensor in TENSORS.items())


def test_streamed_shards_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large shard is written after a reserved header; a full header starts the next shard."""
    monkeypatch.setattr(shard_writer, "STREAM_FROM_BYTES", 1)
    monkeypatch.setattr(shard_writer, "HEADER_ROOM_BYTES", 512)
    write(tmp_path, safe=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(open_tensors(tmp_path))
    for file in tmp_path.glob("model-*.safetensors"):
        load_file(file)


def test_error_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("x")
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, max_shard_bytes=1) as writer:
        writer.add("a", torch.ones(3))
        writer.add("b", torch.ones(3))
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]


def test_older_weights_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, safe=True, max_shard_bytes=1)
    write(tmp_path, safe=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pytorch_model.bin"]


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, safe=False) as writer:
        writer.add("row", torch.zeros(1000, 100)[3])
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 5000


def written_by(kind: str, folder: Path) -> Path:
    """Write the tensors to one file: by our writer, by torch, or by the safetensors package."""
    if kind.startswith("ours"):
        return next(write(folder, safe=kind == "ours safe").glob("*model.*"))
    if kind == "torch":
        torch.save(TENSORS, folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin"
    save_file(TENSORS, folder / "model.safetensors")
    return folder / "model.safetensors"


KINDS = pytest.mark.parametrize("kind", ["ours safe", "ours bin", "torch", "safetensors"])


@KINDS
def test_the_offset_of_a_tensor_in_its_file(tmp_path: Path, kind: str) -> None:
    file = written_by(kind, tmp_path)
    content = file.read_bytes()
    for name, entry in list_tensors(file).items():
        assert entry.start is not None
        expected = TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[entry.start : entry.start + entry.num_bytes] == expected


@KINDS
def test_a_table_with_room_for_more_rows(tmp_path: Path, kind: str) -> None:
    file = written_by(kind, tmp_path)
    content = file.read_bytes()
    entry = list_tensors(file)["a.weight"]
    table = read_with_room(entry, 4)
    assert table is not None
    assert torch.equal(table[:3], TENSORS["a.weight"])
    table[3:] = 7.0
    assert table.untyped_storage().nbytes() == 4 * 4 * 4
    with open_tensors(file) as reader:  # neither the file nor its other tensors change
        assert_same(reader)
    assert file.read_bytes() == content
    assert read_with_room(entry, 10_000) is None


def test_no_room_if_the_table_is_not_contiguous_in_its_file(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    torch.save({"turned": table.t(), "after": torch.ones(99)}, tmp_path / "x.bin")
    packed = tmp_path / "packed.bin"
    torch.save({"table": table, "after": torch.ones(99)}, tmp_path / "y.bin")
    with zipfile.ZipFile(tmp_path / "y.bin") as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    for file, name in ((tmp_path / "x.bin", "turned"), (packed, "table")):
        assert read_with_room(list_tensors(file)[name], 5) is None


@pytest.mark.parametrize("wide_bytes", [2**30, 8])
def test_torch_reads_streamed_bin_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide_bytes: int) -> None:
    monkeypatch.setattr(shard_writer, "WIDE_BYTES", wide_bytes)
    file = write(tmp_path, safe=False) / "pytorch_model.bin"
    for mapped in (False, True):
        state = torch.load(file, weights_only=True, mmap=mapped)
        assert list(state) == list(TENSORS)
        for name, tensor in TENSORS.items():
            assert state[name].dtype == tensor.dtype
            assert state[name].is_contiguous()
            assert torch.equal(state[name], tensor)
            assert not mapped or state[name].data_ptr() % shard_writer.ALIGNMENT == 0
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


def test_a_bin_shard_holds_no_tensor(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, safe=False) as writer:
        tensor = torch.ones(3)
        gone = weakref.ref(tensor)
        writer.add("a", tensor)
        del tensor
        assert gone() is None


def test_a_large_storage_in_the_description_of_a_bin_file() -> None:
    assert pickletools_int(shard_writer._integer(2**31)) == 2**31
    assert pickletools_int(shard_writer._integer(2**31 - 1)) == 2**31 - 1


def pickletools_int(program: bytes) -> Any:
    return next(pickletools.genops(program + b"."))[1]


def test_a_dtype_that_bin_files_cannot_hold(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="cannot hold a, which is float8_e5m2"),
        ShardWriter(tmp_path / "out", safe=False) as writer,
    ):
        writer.add("a", torch.ones(2).to(torch.float8_e5m2))
    assert not list((tmp_path / "out").iterdir())


def test_name_twice(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="twice"), ShardWriter(tmp_path) as writer:
        writer.add("a", torch.ones(1))
        writer.add("a", torch.ones(1))


def test_headers_need_no_torch(tmp_path: Path) -> None:
    write(tmp_path / "safe", safe=True, max_shard_bytes=60)
    write(tmp_path / "bin", safe=False, max_shard_bytes=60)
    code = (
        "import sys\nfrom llava.model.checkpoint.files.shards import list_tensors\n"
        "for folder in sys.argv[1:]: assert len(list_tensors(folder)) == 5\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'safetensors') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "safe"), str(tmp_path / "bin")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_parameters_views_and_shared_storages(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    state = {"p": torch.nn.Parameter(table[1:]), "t": table.t(), "same": table}
    torch.save(state, tmp_path / "x.bin")
    shapes = {name: entry.shape for name, entry in list_tensors(tmp_path / "x.bin").items()}
    assert shapes == {"p": (2, 4), "t": (4, 3), "same": (3, 4)}


@pytest.mark.parametrize("keep", [4, 200, -4])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    write(tmp_path, safe=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        list_tensors(tmp_path)


@pytest.mark.parametrize("keep", [10, 300, -30])
def test_truncated_bin(tmp_path: Path, keep: int) -> None:
    write(tmp_path, safe=False)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        list_tensors(tmp_path)


def test_shortened_storage(tmp_path: Path) -> None:
    write(tmp_path / "a", safe=False)
    with (
        zipfile.ZipFile(tmp_path / "a" / "pytorch_model.bin") as old,
        zipfile.ZipFile(tmp_path / "short.bin", "w") as new,
    ):
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, content[:4] if info.filename.endswith("data/0") else content)
    with pytest.raises(CheckpointError, match="truncated"):
        list_tensors(tmp_path / "short.bin")


class Attack:
    """Object that writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (str(self.target), "w")


def test_code_is_rejected_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save({"a": torch.ones(1), "b": Attack(victim)}, tmp_path / "pytorch_model.bin")
    for function in (list_tensors, open_tensors):
        with pytest.raises(CheckpointError, match=r"holds code") as error:
            function(tmp_path)
        assert "\n" not in str(error.value)
    assert not victim.exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, torch.ones(2), {"a": {"b": torch.ones(1)}}])
def test_bin_without_a_table_of_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="no table of tensors"):
        list_tensors(tmp_path / "x.bin")


def test_plain_pickle_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="torch file"):
        list_tensors(tmp_path)


@pytest.mark.parametrize("safe", [True, False])
def test_a_tensor_that_two_shards_hold(tmp_path: Path, safe: bool) -> None:
    """Leftovers of another save are an error that names both files, whatever the index contains."""
    write(tmp_path, safe=safe, max_shard_bytes=60)
    first, second = sorted(tmp_path.glob("*-of-*"))[:2]
    content = {"a.weight": TENSORS["a.weight"], "c.half": TENSORS["c.half"], "b": TENSORS["b"]}
    save_file(content, second) if safe else torch.save(content, second)
    with pytest.raises(CheckpointError, match=rf"is in two files, .*{first.name} and .*{second.name}") as caught:
        list_tensors(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("safe", [True, False])
def test_missing_shard(tmp_path: Path, safe: bool) -> None:
    write(tmp_path, safe=safe, max_shard_bytes=60)
    next(iter(sorted(tmp_path.glob("*-00002-of-*")))).unlink()
    with pytest.raises(CheckpointError, match=r"missing shard .*00002-of-"):
        list_tensors(tmp_path)


def test_wrong_index(tmp_path: Path) -> None:
    write(tmp_path, safe=True, max_shard_bytes=60)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = content["weight_map"]["b"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="ghost"):
        list_tensors(tmp_path)
    content["weight_map"]["ghost"] = "../outside.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="shards in other folders"):
        list_tensors(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        list_tensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        open_tensors(tmp_path).read("b")


def test_a_name_longer_than_the_reserved_header_keeps_the_tensor_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "STREAM_FROM_BYTES", 1)
    monkeypatch.setattr(shard_writer, "HEADER_ROOM_BYTES", 256)
    tensors = {"x" * 1000: torch.arange(512.0), "y": torch.ones(3)}
    with ShardWriter(tmp_path) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    assert_same(open_tensors(tmp_path), tensors)


def test_a_header_beyond_its_room_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "STREAM_FROM_BYTES", 1)
    monkeypatch.setattr(shard_writer, "HEADER_ROOM_BYTES", 256)
    shard = shard_writer.SafeShard(tmp_path / "model.safetensors")
    shard.add("a", torch.ones(4))
    shard.add("b" * 400, torch.ones(4))  # without checking `has_room`
    with pytest.raises(CheckpointError, match="room for 256"):
        shard.finish()
    shard.drop()
