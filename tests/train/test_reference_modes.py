"""Modes of the reference: what each starts from, what it is compared with, resuming, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from llava.errors import ConfigError
from llava.train.parsing import parse_training_args
from tests.support.pairs import pair_arguments, write_pairs
from tests.support.ranks import run_ranks, start
from tests.support.runs import arguments, losses, metrics, saved, train, train_until_killed, write_parts

KINDS: dict[str, dict[str, object]] = {
    "adapter": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.5},
    "tower adapter": {"lora_enable": True, "lora_r": 4, "vit_lora_enable": True, "lora_r_vit": 2},
    "projector": {"tune_mm_mlp_adapter": True},
    "model": {"unfreeze_mm_vision_tower": True},
}
MODES = ("copy", "adapter_off")  # the cached one is in test_preference_runs
REFUSED = {("adapter_off", "model"): "expected --lora-enable True, --unfreeze-mm-vision-tower False; or use"}
ALLOWED = [(mode, kind) for mode in MODES for kind in KINDS if (mode, kind) not in REFUSED]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_pairs(folder / "pairs")
    return folder


@pytest.fixture(scope="module")
def cached(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of three steps with a cached reference, by kind of training."""
    found = {}
    for kind, options in KINDS.items():
        folder = tmp_path_factory.mktemp("cached")
        train(pair_arguments(parts, folder, **options, **STEPS))
        found[kind] = losses(folder)
    return found


STEPS: dict[str, object] = {"max_steps": 3, "learning_rate": 3e-3}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("cell", ALLOWED, ids=" ".join)
def test_every_step_is_that_of_the_cached_reference(
    parts: Path, tmp_path: Path, cached: dict[str, list[float]], cell: tuple[str, str], world_size: int
) -> None:
    """The first loss is log 2, and a reference that drifted would show in the later ones."""
    mode, kind = cell
    options = {**KINDS[kind], **STEPS, "per_device_train_batch_size": 4 // world_size}
    argv = pair_arguments(parts, tmp_path, **options, ref_mode=mode)
    run_ranks(world_size, train, argv) if world_size > 1 else train(argv)
    found = losses(tmp_path)
    assert found[0] == pytest.approx(math.log(2), abs=1e-5) and metrics(tmp_path)[0]["grad_norm"] > 0
    assert found == pytest.approx(cached[kind], rel=2e-4, abs=1e-5)
    assert max(abs(loss - math.log(2)) for loss in found) > 1e-3
    assert not list(tmp_path.glob("reference-*.jsonl"))


@pytest.mark.parametrize(("mode", "kind"), REFUSED)
def test_refused_cells_are_named(parts: Path, tmp_path: Path, mode: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"--ref-mode {mode} .*{REFUSED[mode, kind]}"):
        parse_training_args(pair_arguments(parts, tmp_path, **KINDS[kind], ref_mode=mode))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vit_lora_enable": True}, "expected --lora-enable True; or use"),
        ({"lora_enable": True, "init_lora_weights": "false"}, "expected no --init-lora-weights false; or use"),
        ({"lora_enable": True, "vit_lora_enable": True, "pretrain_lora": "x"}, "expected no --pretrain-lora; or use"),
    ],
)
def test_an_adapter_that_changes_the_start_cannot_be_switched_off(
    parts: Path, tmp_path: Path, options: dict[str, object], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_training_args(pair_arguments(parts, tmp_path, **options, ref_mode="adapter_off"))


@pytest.mark.parametrize(
    "changed", [{"lora_bias": "all"}, {"modules_to_save": "lm_head"}, {"compat": "frozen_vit_lora"}]
)
def test_other_parts_beside_an_adapter_have_a_copy(parts: Path, tmp_path: Path, changed: dict[str, object]) -> None:
    options = {**KINDS["tower adapter" if "compat" in changed else "adapter"], **STEPS, **changed}
    for mode in ("cached", "adapter_off"):
        train(pair_arguments(parts, tmp_path / mode, **options, ref_mode=mode))
    found, expected = (losses(tmp_path / mode) for mode in ("adapter_off", "cached"))
    assert found == pytest.approx(expected, rel=2e-4, abs=1e-5)
    assert max(abs(loss - math.log(2)) for loss in found) > 1e-3
    own, other = (saved(tmp_path / mode) for mode in ("adapter_off", "cached"))
    assert own.keys() == other.keys()
    for name, weight in other.items():  # a frozen adapter stays frozen
        torch.testing.assert_close(own[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["cached", "copy", "adapter_off", "none"])
def test_killed_and_resumed_equals_uninterrupted(parts: Path, tmp_path: Path, mode: str) -> None:
    options = {**KINDS["adapter"], "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "ref_mode": mode}
    options |= {"pref_loss": "simpo"} if mode == "none" else {}
    train(pair_arguments(parts, tmp_path / "whole", **options))
    broken = pair_arguments(parts, tmp_path / "broken", **options)
    assert start(1, train_until_killed, broken, 3) == [("died", -9)]
    train(broken)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    whole = saved(tmp_path / "whole")
    assert all(tensor.equal(whole[name]) for name, tensor in saved(tmp_path / "broken").items())


def test_the_reference_of_an_adapter_is_that_adapter_and_not_its_base(parts: Path, tmp_path: Path) -> None:
    """Stage 2 begins with the adapter of stage 1: all modes start from log 2 with its log-probabilities."""
    first = {"lora_enable": True, "lora_r": 4, "learning_rate": 3e-2, "max_steps": 3}
    train(arguments(parts, tmp_path / "stage1", **first))
    own = {"model_name_or_path": tmp_path / "stage1", "vision_tower": None, **KINDS["adapter"], **STEPS}
    for mode in ("cached", "adapter_off", "copy"):
        train(pair_arguments(parts, tmp_path / mode, **own, ref_mode=mode))
        assert losses(tmp_path / mode)[0] == pytest.approx(math.log(2), abs=1e-5)
        assert losses(tmp_path / mode) == pytest.approx(losses(tmp_path / "cached"), rel=2e-4, abs=1e-5)
    train(pair_arguments(parts, tmp_path / "base", **KINDS["adapter"], **STEPS))
    values, base = (logprobs(tmp_path / name) for name in ("cached", "base"))
    assert values.keys() == base.keys() and abs(sum(values.values()) - sum(base.values())) > 1


def logprobs(folder: Path) -> dict[str, float]:
    """Return the log-probabilities under the reference, by the key of the sequence."""
    rows = [json.loads(line) for line in (folder / "reference-0.jsonl").read_text().splitlines()]
    return {row["key"]: row["logprob"] for row in rows}
