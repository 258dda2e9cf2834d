"""Provenance fields of results."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch

from llava.utils import provenance
from llava.utils.provenance import TensorHash


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b"x" * 3_000_000)
    assert provenance.file_sha256(path) == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_weights_hash_follows_the_weights_only(tmp_path: Path) -> None:
    assert provenance.weights_sha256(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = provenance.weights_sha256(tmp_path)
    (tmp_path / "notes.txt").write_text("anything")
    assert provenance.weights_sha256(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert provenance.weights_sha256(tmp_path) != first


def test_stamp(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    path.write_text("[]")
    result = provenance.provenance_fields(data={"questions": path}, command=["llava", "eval", "--out", "a b"], seed=3)
    assert result["command"] == "llava eval --out 'a b'"
    assert result["data"] == {"questions": {"file": "test.json", "sha256": hashlib.sha256(b"[]").hexdigest()}}
    assert result["seed"] == 3
    assert str(tmp_path) not in repr(result)


def test_commit_is_a_hash_where_there_is_a_checkout() -> None:
    commit = provenance.git_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", commit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_a_tensor_hash_is_that_of_texts_and_bytes_in_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).view(2, 3).to(dtype)
    found = TensorHash("start")
    found.add("a", tensor.t())
    found.add("b", tensor[:0])
    whole = b"starta" + bytes(tensor.t().contiguous().view(torch.uint8).flatten().tolist()) + b"b"
    assert found.value() == hashlib.sha256(whole).hexdigest()
