"""Runs with DeepSpeed and FSDP2 that were killed while they saved resume with the results of uninterrupted ones.

Such a checkpoint is complete when it has its keyed mark, which is written after the files of all ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import LlavaError
from tests.support.fast_python import without_build
from tests.support.pairs import pair_arguments, write_pairs
from tests.support.ranks import allow_fsdp_on_cpu, run_ranks, start
from tests.support.runs import arguments, losses, saved, steps, train

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "plain": "DistributedDataParallel",
    "deepspeed": "DeepSpeedEngine",
    "fsdp2": "FSDPLlavaMedForConditionalGeneration",
}
"""Kinds of sharding, and the class that wraps the model."""

SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
LAYERS = {
    "version": 2,
    "state_dict_type": "SHARDED_STATE_DICT",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}


def words(parts: Path, folder: Path, kind: str) -> list[str]:
    """Return the command line of four steps over rows with and without images, with checkpoints 2 and 4."""
    data = {"data_path": parts / "uneven.json", "image_folder": parts / "images", "per_device_train_batch_size": 2}
    sharding: dict[str, object] = {}
    if kind == "deepspeed":
        sharding = {"deepspeed": ROOT / "scripts" / "zero2.json"}
    elif kind == "fsdp2":
        (folder.parent / "fsdp.json").write_text(json.dumps(LAYERS))
        sharding = {"fsdp": "full_shard auto_wrap", "fsdp_config": folder.parent / "fsdp.json"}
    return arguments(parts, folder, **data, **SAVED, **sharding)


def prepare(kind: str, key: Path) -> None:
    """Prepare a rank for a kind of sharding; its marks are made with the key in a file."""
    os.environ["LLAVA_KEY_FILE"] = str(key)
    if kind == "deepspeed":
        without_build()
    elif kind == "fsdp2":
        allow_fsdp_on_cpu()


def killing(at: str) -> None:
    """Let SIGKILL end a rank while it saves checkpoint-4.

    Args:
        at: `rank 1`: rank 1 has not saved its random state; `mark`: only the mark is missing.
    """
    from llava.train import state_files
    from llava.train.trainer import LlavaTrainer

    def before(real: Callable[..., None], is_moment: Callable[..., bool]) -> Callable[..., None]:
        def call(*values: Any) -> None:
            if is_moment(*values):
                os.kill(os.getpid(), signal.SIGKILL)
            real(*values)

        return call

    if at == "rank 1":
        real = LlavaTrainer._save_rng_state
        LlavaTrainer._save_rng_state = before(  # type: ignore[method-assign]
            real, lambda trainer, folder: trainer.args.process_index == 1 and folder.endswith("checkpoint-4")
        )
    else:
        state_files.write_mark = before(state_files.write_mark, lambda checkpoint: checkpoint.name == "checkpoint-4")


def run(argv: list[str], kind: str, key: Path, kill: str = "") -> str:
    """Job: a training run, or until it is killed; returns the class that wrapped the model."""
    from llava.train import run as training

    prepare(kind, key)
    if kill:
        killing(kill)
    kept: dict[str, Any] = {}
    make = training.make_trainer

    def keep(*values: Any, **named: Any) -> Any:
        kept["trainer"] = make(*values, **named)
        return kept["trainer"]

    training.make_trainer = keep
    train(argv)
    return type(kept["trainer"].model_wrapped).__name__


def refusals(commands: list[list[str]], kind: str, key: Path) -> list[str]:
    """Job: the messages of runs that are refused before they train."""
    prepare(kind, key)
    found = []
    for argv in commands:
        try:
            train(argv)
        except LlavaError as error:
            found.append(str(error))
        else:
            found.append("not refused")
    return found


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / "checkpoint.key"


@pytest.fixture(scope="module")
def whole(
    parts: Path, key: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[str, Path]]:
    """A kind of sharding, and the folder of an uninterrupted run with it."""
    kind: str = request.param
    folder = tmp_path_factory.mktemp(kind) / "whole"
    wrapped = run_ranks(2, run, words(parts, folder, kind), kind, key)
    assert wrapped == [KINDS[kind]] * 2
    assert len(list((folder / "checkpoint-4").glob("written_here-*.json"))) == (kind != "plain")
    yield kind, folder
    shutil.rmtree(folder)


def moments(*pairs: tuple[str, str]) -> pytest.MarkDecorator:
    """Run a test of a kind of sharding and a moment; only one of each kind by default."""
    extended = {("deepspeed", "rank 1"), ("fsdp2", "rank 1")}
    marks = {pair: [pytest.mark.extended] if pair in extended else [] for pair in pairs}
    return pytest.mark.parametrize(
        ("whole", "at"), [pytest.param(*pair, marks=marks[pair]) for pair in pairs], indirect=["whole"]
    )


@moments(("plain", "rank 1"), ("deepspeed", "mark"), ("deepspeed", "rank 1"), ("fsdp2", "mark"), ("fsdp2", "rank 1"))
def test_a_run_that_was_killed_between_files_equals_the_uninterrupted_one(
    parts: Path, whole: tuple[str, Path], key: Path, tmp_path: Path, at: str
) -> None:
    kind, expected = whole
    folder = tmp_path / "run"
    outcomes = start(2, run, words(parts, folder, kind), kind, key, at)
    assert ("died", -9) in outcomes
    assert (folder / "checkpoint-2").is_dir()
    assert (folder / "checkpoint-4" / "trainer_state.json").is_file() == (at == "mark")
    run_ranks(2, run, words(parts, folder, kind), kind, key)
    assert losses(folder) == losses(expected) and steps(folder) == [1, 2, 3, 4]
    first, second = saved(expected), saved(folder)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    "mode",
    ["cached", pytest.param("copy", marks=pytest.mark.extended), pytest.param("none", marks=pytest.mark.extended)],
)
def test_pairs_under_zero_3_that_were_killed_equal_uninterrupted_ones(
    parts: Path, key: Path, tmp_path: Path, mode: str
) -> None:
    """The run is killed after its last step, so until then it is the uninterrupted one; it resumes after step 2."""
    write_pairs(parts / "pairs")
    given = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0, "per_device_train_batch_size": 2, **SAVED}
    given |= {"ref_mode": mode, "pref_loss": "simpo" if mode == "none" else "sigmoid"}
    argv = pair_arguments(parts, tmp_path / "run", **given, deepspeed=ROOT / "scripts" / "zero3.json")
    assert ("died", -9) in start(2, run, argv, "deepspeed", key, "mark")
    names = ["loss", "rewards/margins", "logps/chosen"]
    expected = [losses(tmp_path / "run", name) for name in names]
    assert all(len(values) == 4 for values in expected)
    weights = saved(tmp_path / "run" / "checkpoint-4")
    assert run_ranks(2, run, argv, "deepspeed", key) == [KINDS["deepspeed"]] * 2
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    assert [losses(tmp_path / "run", name) for name in names] == expected
    again = saved(tmp_path / "run")
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)


def largest(checkpoint: Path, pattern: str) -> Path:
    return max(checkpoint.glob(pattern), key=lambda path: path.stat().st_size)


def tear(checkpoint: Path, pattern: str) -> None:
    file = largest(checkpoint, pattern)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(checkpoint: Path, pattern: str) -> None:
    file = largest(checkpoint, pattern)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace_mark(checkpoint: Path, pattern: str) -> None:
    [mark] = checkpoint.glob("written_here-*.json")
    content = json.loads(mark.read_text())
    mark.write_text(json.dumps({**content, "hmac": "0" * len(content["hmac"])}))


DAMAGES: dict[str, tuple[Callable[[Path, str], object], str]] = {
    "torn optimizer": (tear, "was changed"),
    "flipped bit": (flip, "was changed"),
    "lost shard": (lambda checkpoint, pattern: largest(checkpoint, pattern).unlink(), "is missing from it"),
    "foreign file": (lambda checkpoint, _: (checkpoint / "extra.pt").write_bytes(b"\x80\x04N."), "was added to it"),
    "link": (lambda checkpoint, _: (checkpoint / "extra").symlink_to("/tmp"), "expected no links"),
    "forged mark": (replace_mark, "was not made with"),
}
"""What is done to a checkpoint, and what the refusal says."""

SHARDS = {"deepspeed": "global_step*/*optim_states.pt", "fsdp2": "optimizer_0/*.distcp"}


@pytest.mark.parametrize("whole", SHARDS, indirect=True)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    parts: Path, whole: tuple[str, Path], key: Path, tmp_path: Path
) -> None:
    kind, finished = whole
    commands = []
    for name, (damage, _) in DAMAGES.items():
        folder = Path(shutil.copytree(finished, tmp_path / name / "run"))
        damage(folder / "checkpoint-4", SHARDS[kind])
        commands.append(words(parts, folder, kind))
    for found in run_ranks(2, refusals, commands, kind, key):
        for text, (name, (_, expected)) in zip(found, DAMAGES.items(), strict=True):
            assert expected in text and "\n" not in text and str(tmp_path / name) in text, (name, text)
