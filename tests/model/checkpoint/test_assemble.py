"""Rows for new tokens: the mean of the old ones, with and without a copy of the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.model.checkpoint.assemble import grow_tables, mean_rows
from llava.model.checkpoint.files.shard_writer import ShardWriter
from llava.model.checkpoint.files.shards import list_tensors, open_tensors
from llava.model.checkpoint.weight_names import EMBEDDINGS

TABLE = torch.randn(1500, 6, generator=torch.Generator().manual_seed(0))


def write(folder: Path, *, safe: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    state = {"embed_tokens.weight": TABLE.to(dtype), "lm_head.weight": TABLE.flip(0).to(dtype), "z": torch.ones(999)}
    with ShardWriter(folder, safe=safe) as writer:
        for name, tensor in state.items():
            writer.add(name, tensor)
    return state


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_the_mean_with_and_without_a_copy(tmp_path: Path, safe: bool, dtype: torch.dtype) -> None:
    expected = write(tmp_path, safe=safe, dtype=dtype)
    with open_tensors(tmp_path) as reader:
        plain = {EMBEDDINGS: reader.read("embed_tokens.weight"), "lm_head.weight": reader.read("lm_head.weight")}
    mapped = dict(plain)
    grow_tables(plain, 1502)
    grow_tables(mapped, 1502, list_tensors(tmp_path))
    for ours, name in ((EMBEDDINGS, "embed_tokens.weight"), ("lm_head.weight", "lm_head.weight")):
        assert plain[ours].shape == (1502, 6)
        assert torch.equal(plain[ours], mapped[ours])
        assert torch.equal(plain[ours][:1500], expected[name])
        mean = expected[name].double().mean(dim=0).to(dtype).expand(2, -1)
        torch.testing.assert_close(plain[ours][1500:], mean, atol=1e-6, rtol=1e-2)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in open_tensors(tmp_path))


def test_no_copy_is_made_if_the_file_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, safe=True, dtype=torch.float16)
    entry = list_tensors(tmp_path)["embed_tokens.weight"]
    monkeypatch.setattr(torch, "cat", None)
    assert len(mean_rows(TABLE.half(), 1, entry)) == 1501


def test_a_table_that_differs_from_the_file_is_copied(tmp_path: Path) -> None:
    write(tmp_path, safe=True, dtype=torch.float16)
    entry = list_tensors(tmp_path)["embed_tokens.weight"]
    other = torch.zeros(1499, 6, dtype=torch.float16)
    assert not mean_rows(other, 1, entry).any()
    assert mean_rows(torch.zeros(1500, 6), 1, entry).dtype == torch.float32


def test_tables_never_shrink() -> None:
    state = {EMBEDDINGS: TABLE, "lm_head.weight": TABLE}
    grow_tables(state, 10)
    assert state == {EMBEDDINGS: TABLE, "lm_head.weight": TABLE}
