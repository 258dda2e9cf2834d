"""Broken checkpoints of other formats and in the delta tools: one line of error, nothing run, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava import cli
from llava.errors import LlavaError
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.files.shard_writer import ShardWriter
from llava.model.checkpoint.files.shards import open_tensors
from llava.model.checkpoint.folder import write_json
from llava.model.checkpoint.formats import read_json
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.checkpoint.tools import delta
from llava.model.checkpoint.tools.cli import apply_delta, consolidate_main, make_delta, merge_lora_weights
from llava.model.lora import add_lora
from tests.model.checkpoint.test_broken_checkpoints import VICTIM, Attack, assert_rejected, cut, drop_shard
from tests.support.legacy_folders import write_legacy, write_lora
from tests.support.tiny import tiny_llava, write_tiny_lm

Break = Callable[[Path], None]
Program = Callable[[list[str]], None]


def put_code_inside(folder: Path) -> None:
    file = sorted(folder.glob("*.bin"))[-1]
    torch.save({**torch.load(file), "extra": Attack(folder / VICTIM)}, file)


def lose_a_tensor(folder: Path) -> None:
    rewrite(folder, lambda state: {name: tensor for name, tensor in state.items() if "up_proj" not in name})


def wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda state: {**state, next(name for name in state if "up_proj" in name): torch.ones(7)})


def add_a_stranger(folder: Path) -> None:
    rewrite(folder, lambda state: {**state, "critic.weight": torch.ones(7)})


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    state = {name: tensor.clone() for name, tensor in open_tensors(folder)}
    with ShardWriter(folder) as writer:
        for name, tensor in change(state).items():
            writer.add(name, tensor)


BREAKS: tuple[tuple[Break, str], ...] = (
    (cut, "truncated"),
    (lose_a_tensor, "missing_keys"),
    (wrong_shape, "mismatched_keys"),
    (add_a_stranger, "unexpected_keys|belongs to no part"),
)


@pytest.mark.parametrize(("change", "message"), BREAKS)
@pytest.mark.parametrize("form", ["ours", "hf"])
def test_our_models_and_those_of_transformers(tmp_path: Path, form: str, change: Break, message: str) -> None:
    loaded = tiny_llava(projector_type="mlp2x_gelu")
    if form == "ours":
        save_model(loaded.model, loaded.processor, tmp_path / "model")
    else:
        export_hf(loaded, tmp_path / "model")
    change(tmp_path / "model")
    assert_rejected(tmp_path / "model", tmp_path, message)


def test_our_parts_without_their_base(tmp_path: Path) -> None:
    loaded = tiny_llava()
    save_projector(loaded.model, loaded.processor, tmp_path / "projector")
    save_adapter(add_lora(loaded, r=2), loaded.processor, tmp_path / "adapter")
    for part in ("projector", "adapter"):
        with pytest.raises(LlavaError, match="--model-base") as caught:
            cli_load(tmp_path / part)
        assert "\n" not in str(caught.value)


def cli_load(folder: Path) -> None:
    from llava.model.checkpoint.load import load_checkpoint

    load_checkpoint(folder)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Write `base` and `delta`, in several `.bin` files each."""
    for name, seed in (("base", 0), ("target", 1)):
        lm = write_tiny_lm(tmp_path / f"{name} lm", seed=seed)
        state = {name: tensor.clone() for name, tensor in open_tensors(lm)}
        with ShardWriter(tmp_path / name, safe=False, max_shard_bytes=20_000) as writer:
            for key, tensor in state.items():
                writer.add(key, tensor)
        write_json(tmp_path / name / "config.json", read_json(lm / "config.json"))
    writing = delta.WriteOptions(torch.float32, 20_000, safe=False)
    delta.write_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta", writing)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [(cut, "truncated"), (drop_shard, "missing shard"), (put_code_inside, "holds code")],
)
@pytest.mark.parametrize(
    ("program", "words", "broken"),
    [
        (apply_delta, ["--base", "base", "--delta", "delta", "--target", "out"], "base"),
        (apply_delta, ["--base", "base", "--delta", "delta", "--target", "out"], "delta"),
        (make_delta, ["--base", "base", "--target", "target", "--delta", "out"], "base"),
        (make_delta, ["--base", "base", "--target", "target", "--delta", "out"], "target"),
        (consolidate_main, ["--src", "target", "--dst", "out"], "target"),
    ],
)
def test_delta_tools(  # noqa: PLR0917
    pair: Path, program: Program, words: list[str], broken: str, change: Break, message: str
) -> None:
    change(pair / broken)
    stops_in_one_line(pair, program, [word if word.startswith("-") else str(pair / word) for word in words], message)


def stops_in_one_line(root: Path, program: Program, words: list[str], message: str) -> None:
    before = {str(file): file.stat().st_mtime_ns for file in root.rglob("*")}
    with pytest.raises(LlavaError, match=message) as caught:
        program(words)
    assert "\n" not in str(caught.value)
    assert {str(file): file.stat().st_mtime_ns for file in root.rglob("*")} == before
    assert not list(root.rglob(VICTIM))


def cut_adapter(folder: Path) -> None:
    file = folder / "lora" / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:-300])


def code_in_adapter(folder: Path) -> None:
    file = folder / "lora" / "non_lora_trainables.bin"
    torch.save({**torch.load(file), "extra": Attack(folder / VICTIM)}, file)


def cut_base(folder: Path) -> None:
    cut(folder / "lm")


def no_base(folder: Path) -> None:
    (folder / "lm").rename(folder / "moved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_adapter, "truncated"),
        (code_in_adapter, "holds code"),
        (cut_base, "truncated"),
        (no_base, "no such folder|--model-base"),
    ],
)
def test_merging_an_adapter(tmp_path: Path, change: Break, message: str) -> None:
    lora = write_lora(tmp_path, safe=False)
    change(tmp_path)
    words = ["--model-path", lora, "--model-base", tmp_path / "lm", "--save-model-path", tmp_path / "out"]
    stops_in_one_line(tmp_path, merge_lora_weights, [str(word) for word in words], message)


@pytest.mark.parametrize("command", ["inspect", "doctor", "convert", "export", "diff"])
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ({}, cut, "truncated"),
        ({"num_shards": 3}, drop_shard, "missing shard"),
        ({"safe": False}, put_code_inside, "holds code"),
    ],
)
def test_the_checkpoint_commands(  # noqa: PLR0917
    tmp_path: Path, capsys: Any, command: str, kind: dict[str, Any], change: Break, message: str
) -> None:
    folder = write_legacy(tmp_path, **kind)
    change(folder)
    capsys.readouterr()
    second = {"inspect": [], "doctor": [], "diff": [str(folder)]}.get(command, [str(tmp_path / "out")])
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["checkpoint", command, str(folder), *second])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("llava: error: ")
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not printed.out
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before
