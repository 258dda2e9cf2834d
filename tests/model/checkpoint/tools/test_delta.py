"""Deltas: base + (target - base) is the target, new rows and image parts are unchanged, errors leave nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.checkpoint.files.shard_writer import ShardWriter
from llava.model.checkpoint.files.shards import open_tensors
from llava.model.checkpoint.tools import delta
from llava.model.checkpoint.tools.delta import WriteOptions
from tests.support.processes import run_command

ROOT = Path(__file__).resolve().parents[4]
WIDTH = 8
FULL = WriteOptions(torch.float32)
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
State = dict[str, Tensor]


def language_model(num_rows: int, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (num_rows, WIDTH),
        "model.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH),
        "model.layers.0.input_layernorm.weight": (WIDTH,),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (num_rows, WIDTH),
    }
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def projector(kind: str) -> State:
    names = {"linear": ["weight", "bias"], "mlp2x_gelu": ["0.weight", "0.bias", "2.weight", "2.bias"]}[kind]
    return {f"model.mm_projector.{name}": torch.full((WIDTH,), float(number)) for number, name in enumerate(names)}


def write(folder: Path, state: State, *, safe: bool = True, max_shard_bytes: int = 10**9) -> Path:
    with ShardWriter(folder, safe=safe, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in state.items():
            writer.add(name, tensor)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "torch_dtype": "float32"}))
    (folder / "tokenizer.model").write_bytes(b"words of " + folder.name.encode())
    (folder / "trainer_state.json").write_text("{}")
    return folder


def read(folder: Path) -> State:
    with open_tensors(folder) as reader:
        return {name: tensor.clone() for name, tensor in reader}


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize(("base_rows", "target_rows"), [(30, 33), (30, 34), (31, 33), (31, 34), (30, 30)])
def test_applying_gives_the_target(tmp_path: Path, base_rows: int, target_rows: int, kind: str) -> None:
    base = write(tmp_path / "base", language_model(base_rows, 0), safe=False, max_shard_bytes=600)
    wanted = {**language_model(target_rows, 1), **projector(kind), "model.image_newline": torch.ones(WIDTH)}
    target = write(tmp_path / "target", wanted, max_shard_bytes=600)
    made = delta.write_delta(base, target, tmp_path / "delta", FULL)
    stored = read(tmp_path / "delta")
    for name in TABLES:
        assert torch.equal(stored[name][base_rows:], wanted[name][base_rows:])
        assert torch.equal(stored[name][:base_rows], wanted[name][:base_rows] - language_model(base_rows, 0)[name])
    assert all(torch.equal(stored[name], wanted[name]) for name in projector(kind))
    assert delta.write_target(base, tmp_path / "delta", tmp_path / "again", FULL, verify=True) == "verified"
    again = read(tmp_path / "again")
    assert again.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(again[name], tensor)
    assert len(made["result_sha256"]) == 64
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == b"words of target"
    assert not (tmp_path / "again" / "trainer_state.json").exists()


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("base_rows", [32_000, 32_001])
@pytest.mark.parametrize("target_rows", [32_003, 32_004])
def test_vocabularies_of_the_published_models(tmp_path: Path, base_rows: int, target_rows: int, kind: str) -> None:
    """Vocabularies of 32000 (LLaMA) or 32001 (Vicuna) base rows and 32003 or 32004 target rows, both file formats."""
    base = write(tmp_path / "base", language_model(base_rows, 0), safe=kind == "linear")
    wanted = {**language_model(target_rows, 1), **projector(kind)}
    target = write(tmp_path / "target", wanted, safe=kind != "linear", max_shard_bytes=10**6)
    delta.write_delta(base, target, tmp_path / "delta", FULL)
    full = WriteOptions(torch.float32, 10**6, safe=kind == "linear")
    assert delta.write_target(base, tmp_path / "delta", tmp_path / "again", full, verify=True) == "verified"
    again = read(tmp_path / "again")
    assert again.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-6)
    assert torch.equal(again[TABLES[0]][base_rows:], wanted[TABLES[0]][base_rows:])


def test_half_precision_is_the_published_arithmetic(tmp_path: Path) -> None:
    base = write(tmp_path / "base", language_model(30, 0))
    target = write(tmp_path / "target", language_model(33, 1))
    delta.write_delta(base, target, tmp_path / "delta")
    delta.write_target(base, tmp_path / "delta", tmp_path / "again", WriteOptions(safe=False), verify=True)
    again, wanted = read(tmp_path / "again"), read(target)
    for name, tensor in wanted.items():
        assert again[name].dtype == torch.float16
        torch.testing.assert_close(again[name].float(), tensor, rtol=2e-3, atol=2e-3)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "float16"
    assert (tmp_path / "again" / "pytorch_model.bin").is_file()


def test_rotary_tables_are_left_out(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base = write(tmp_path / "base", {**language_model(30, 0), name: torch.ones(4)})
    old = {**language_model(30, 1), name: torch.zeros(4)}
    delta.write_target(base, write(tmp_path / "delta", old), tmp_path / "again", FULL)
    assert name not in read(tmp_path / "again")


def changed(state: State, **tensors: Tensor) -> State:
    return {**state, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(language_model(30, 1), model__norm__weight=torch.ones(9)), "another model size"),
        (language_model(29, 1), "another model size"),
        (changed(language_model(30, 1), model__layers__1__x=torch.ones(9)), "expected the base"),
        ({"model.norm.weight": torch.ones(WIDTH)}, "lacks 4 tensors"),
    ],
)
def test_a_mismatch_is_rejected_and_nothing_is_left(tmp_path: Path, state: State, message: str) -> None:
    base = write(tmp_path / "base", language_model(30, 0))
    given = write(tmp_path / "delta", state)
    with pytest.raises(CheckpointError, match=message):
        delta.write_target(base, given, tmp_path / "again", FULL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]


def test_another_base_of_the_same_shape_is_rejected(tmp_path: Path) -> None:
    base, other = (write(tmp_path / str(seed), language_model(30, seed)) for seed in (0, 5))
    delta.write_delta(base, write(tmp_path / "target", language_model(30, 1)), tmp_path / "delta", FULL)
    with pytest.raises(CheckpointError, match="not the model that this delta was made from"):
        delta.write_target(other, tmp_path / "delta", tmp_path / "again", FULL)
    half = write(tmp_path / "half", {name: tensor.half().float() for name, tensor in language_model(30, 0).items()})
    assert delta.write_target(half, tmp_path / "delta", tmp_path / "again", FULL) == "not verified"


def test_a_damaged_delta_is_found(tmp_path: Path) -> None:
    base = write(tmp_path / "base", language_model(30, 0))
    delta.write_delta(base, write(tmp_path / "target", language_model(30, 1)), tmp_path / "delta", FULL)
    state = read(tmp_path / "delta")
    state["lm_head.weight"][3, 3] += 1
    save_file(state, tmp_path / "delta" / "model.safetensors")
    with pytest.raises(CheckpointError, match="differs from the one the delta was made for"):
        delta.write_target(base, tmp_path / "delta", tmp_path / "again", FULL, verify=True)
    with pytest.raises(CheckpointError, match="--dtype float32"):
        delta.write_target(base, tmp_path / "delta", tmp_path / "again", verify=True)
    assert not (tmp_path / "again").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    base = write(tmp_path / "base", language_model(30, 0))
    with pytest.raises(CheckpointError, match="exists already"):
        delta.write_delta(base, base, write(tmp_path / "full", language_model(30, 1)), FULL)


def test_the_printed_commands(tmp_path: Path, python: Path) -> None:
    """`--base`, `--target`, `--delta` are short forms."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return run_command([python, "-m", *words], cwd=ROOT, timeout=900)

    base = write(tmp_path / "base", language_model(30, 0))
    target = write(tmp_path / "target", {**language_model(33, 1), **projector("linear")}, max_shard_bytes=600)
    places = ("--base", base, "--delta", tmp_path / "delta", "--target")
    made = run("llava.model.make_delta", *places, target)
    assert made.returncode == 0 and "result sha256" in made.stdout
    applied = run("llava.model.apply_delta", *places, tmp_path / "again", "--verify")
    assert applied.returncode == 0 and "verified" in applied.stdout
    short = run("llava.model.consolidate", "--src", target, "--dst", tmp_path / "one", "--dtype", "float32")
    assert short.returncode == 0, short.stderr
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert all(torch.equal(tensor, read(target)[name]) for name, tensor in read(tmp_path / "one").items())
    next(target.glob("model-00002*")).unlink()
    broken = run("llava.model.make_delta", *places[:3], tmp_path / "second", "--target", target)
    assert broken.returncode == 2 and "\nllava: error: " in broken.stderr and "Traceback" not in broken.stderr
    assert not list(tmp_path.glob("*second*"))
