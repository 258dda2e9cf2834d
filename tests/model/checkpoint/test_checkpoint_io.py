"""The benchmark of reading and writing checkpoints at a tiny size: all parts run and measure what they should."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoint_io, checkpoint_sides
from benchmarks.checkpoint_files import Sizes, write_models, write_pair
from llava.model.checkpoint.files.shards import list_tensors, open_tensors

TINY = Sizes(width=128, num_layers=1, max_shard_bytes=10 * 10**6)
FORMS = pytest.mark.parametrize("form", checkpoint_io.FORMS)


@FORMS
def test_both_ways_of_applying_a_delta_write_the_same(tmp_path: Path, form: str) -> None:
    base, delta = write_pair(tmp_path, TINY, safe=form == "safetensors")
    assert len({entry.file for entry in list_tensors(base).values()}) > 1
    for side in ("delta_ours", "delta_both_models"):
        out = tmp_path / side
        checkpoint_sides.SIDES[side](str(base), str(delta), str(out), str(TINY.max_shard_bytes), form)
        assert {entry.file.suffix for entry in list_tensors(out).values()} == {f".{form}"}
    checkpoint_io.assert_equal(tmp_path / "delta_ours", tmp_path / "delta_both_models")
    with open_tensors(tmp_path / "delta_ours") as ours, open_tensors(base) as old, open_tensors(delta) as new:
        table = "model.embed_tokens.weight"
        rows = old.entries[table].shape[0]
        assert torch.equal(ours.read(table)[:rows], old.read(table) + new.read(table)[:rows])
        assert torch.equal(ours.read(table)[rows:], new.read(table)[rows:])


def test_different_results_are_seen(tmp_path: Path) -> None:
    base, delta = write_pair(tmp_path, TINY, safe=True)
    with pytest.raises(RuntimeError, match="differs between"):
        checkpoint_io.assert_equal(base, delta)


@FORMS
def test_both_sides_load_the_same_bits(tmp_path: Path, form: str) -> None:
    legacy, hf = write_models(tmp_path, TINY, safe=form == "safetensors")
    for folder in (legacy, hf):
        files = {entry.file for entry in list_tensors(folder).values()}
        assert len(files) > 1
        assert {file.suffix for file in files} == {f".{form}"}
    ours, plain = checkpoint_sides.load_ours(str(legacy)), checkpoint_sides.load_plain(str(hf))
    assert ours["sum"] == plain["sum"] != 0


def test_a_side_runs_in_a_process_of_its_own_and_its_memory_is_seen(tmp_path: Path) -> None:
    base, delta = write_pair(tmp_path, TINY, safe=True)
    words = (base, delta, tmp_path / "out", TINY.max_shard_bytes, "safetensors")
    measured = checkpoint_io.run_side("delta_ours", *words)
    assert measured["seconds"] > 0
    assert 1 < measured["mib"] < 500


def test_a_side_that_fails_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="load_ours nowhere failed"):
        checkpoint_io.run_side("load_ours", "nowhere")


def test_anonymous_memory() -> None:
    before = checkpoint_io.anonymous_mib(os.getpid())
    # A mapping of its own: a tensor may get memory that the allocator has kept from earlier tests.
    with mmap.mmap(-1, 32 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as filled:
        filled.write(b"x" * len(filled))
        after = checkpoint_io.anonymous_mib(os.getpid())
    assert before is not None
    assert after is not None
    assert 28 < after - before < 40
    assert checkpoint_io.anonymous_mib(2**30) is None


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    ratios: dict[str, float] = {}
    runs = [{"loaded": 1.0, "read": 1.0, "mib": 5.0}]
    peer = [{"loaded": 2.0, "read": 0.5, "processor": 0.5, "mib": 5.0}]
    checkpoint_io.report("bin", "load", {"ours": runs, "plain": peer}, ratios)
    assert ratios == {"load_bin": 0.8, "load_model_bin": 1.0}
    both = {"ours": [{"seconds": 1.0, "mib": 1.0}], "both": [{"seconds": 4.0, "mib": 2.0}]}
    checkpoint_io.report("bin", "delta", both, ratios)
    assert (ratios["delta_memory_bin"], ratios["delta_time_bin"]) == (0.5, 0.25)
    assert "| both | 4.00 | 2.00 |" in capsys.readouterr().out
