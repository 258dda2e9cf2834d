"""Runs of reinforcement learning on a toy: records, metrics, resuming, ranks, and what a run learns."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.errors import ConfigError, LlavaError
from llava.symbolic.dialogues import dialogue_row
from llava.symbolic.rules import load_rules
from llava.train.rollout.records import draw_curves
from llava.train.rollout.run import PRIORS_FILE, check_setting
from tests.support.ranks import run_ranks, start
from tests.support.rollouts import TOY, rl_arguments, rl_train, rl_train_until_killed, rollouts, write_toy
from tests.support.runs import losses, metrics, saved


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


KEYS = {"step", "case", "group", "sample", "seed", "style", "asked", "answers", "values", "finishes", "logprobs", "raw",
        "total", "turns", "components", "advantages", "dropped"}  # fmt: skip
NAMES = {"reward", "reward/correctness", "A_C", "no_match", "hedged", "void", "kl", "entropy", "clip_share",
         "engine_difference", "shared_tokens", "seconds/rollout", "seconds/scoring", "seconds/update"}  # fmt: skip


def test_a_run_writes_its_rollouts_metrics_and_curves(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        rl_train(rl_arguments(parts, tmp_path, response_len=8))
    rows = rollouts(tmp_path)
    answers = {answer for row in rows for answer in row["answers"] if len(answer) > 3}
    shown = caplog.text + (tmp_path / "metrics.jsonl").read_text()
    assert answers and caplog.text and not any(answer in shown for answer in answers)  # only rollouts.jsonl has them
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8 and all(row.keys() >= KEYS for row in rows)
    assert [(row["group"], row["sample"]) for row in rows[:8]] == [(g, s) for g in range(2) for s in range(4)]
    for row in rows:
        assert sum(row["turns"]) == pytest.approx(row["raw"]) and len(row["logprobs"]) == len(row["asked"]) == 2
    for first in range(0, 16, 4):
        group = rows[first : first + 4]
        assert len({(row["case"], row["seed"], tuple(row["asked"])) for row in group}) == 1
        assert len({tuple(row["answers"]) for row in group}) > 1
    lines = metrics(tmp_path)[:2]
    assert all(line.keys() >= NAMES for line in lines)
    for step, line in enumerate(lines, start=1):
        own = [row for row in rows if row["step"] == step]
        assert line["reward"] == pytest.approx(sum(row["total"] for row in own) / 8, abs=1e-5)
        assert line["engine_difference"] < 1e-5
    assert (tmp_path / "rollout_curves.png").stat().st_size > 10_000
    counts = {"shade": {"dark": 3, "light": 3}, "kind": {"cell": 3, "clot": 3}}
    assert json.loads((tmp_path / PRIORS_FILE).read_text()) == counts


@pytest.mark.parametrize("num_steps", [1, 2])
def test_curves_need_two_steps(num_steps: int, tmp_path: Path) -> None:
    rows = [json.dumps({"step": step, "reward": 0.5, "kl": 0.1}) + "\n" for step in range(1, num_steps + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists() == (num_steps == 2)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_run_raises_the_reward(parts: Path, tmp_path: Path, algorithm: str) -> None:
    rl_train(
        rl_arguments(
            parts, tmp_path, objective=algorithm, max_steps=14, rollout_batch_size=32, num_generations=8,
            response_len=2, lr_scheduler_type="constant", lora_enable=False, learning_rate=3e-3, kl_coef=0.0,
            vf_coef=0.5, mm_projector_lr=0,
        )
    )  # fmt: skip
    rewards = losses(tmp_path, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2


RESUMED = {"learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rollout_batch_size": 8,
           "response_len": 2, "logging_steps": 1}  # fmt: skip


def result(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    return (folder / "rollouts.jsonl").read_text(), saved(folder)


@pytest.fixture(scope="module")
def undisturbed(
    parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    """Results of runs that nothing disturbed, by algorithm, each in one process with one thread."""
    found = {}
    for algorithm, options in (("grpo", {}), ("ppo", {"noptepochs": 2, "kl_target": 0.1})):
        folder = tmp_path_factory.mktemp(algorithm)
        run_ranks(1, rl_train, rl_arguments(parts, folder, objective=algorithm, **RESUMED | options))
        found[algorithm] = result(folder)
    return found


@pytest.mark.parametrize(("algorithm", "kill"), [
    ("grpo", ("written", 1)), ("grpo", ("half", 4)), ("ppo", ("step", 7)),
])  # fmt: skip
def test_a_killed_run_repeats_itself(
    parts: Path, tmp_path: Path, undisturbed: dict, algorithm: str, kill: tuple[str, int]
) -> None:
    options = {"noptepochs": 2, "kl_target": 0.1} if algorithm == "ppo" else {}
    argv = rl_arguments(parts, tmp_path, objective=algorithm, **RESUMED | options)
    [(kind, _)] = start(1, rl_train_until_killed, argv, *kill)
    assert kind == "died"
    run_ranks(1, rl_train, argv)
    text, weights = result(tmp_path)
    assert text == undisturbed[algorithm][0]
    for name, weight in undisturbed[algorithm][1].items():
        assert torch.equal(weights[name], weight), name
    lines = [row["step"] for row in metrics(tmp_path) if "loss" in row]
    assert lines == [2, 4, 6, 8] if algorithm == "ppo" else [1, 2, 3, 4]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_two_ranks_equal_one(parts: Path, tmp_path: Path, undisturbed: dict, algorithm: str) -> None:
    options = {"noptepochs": 2, "kl_target": 0.1} if algorithm == "ppo" else {}
    run_ranks(2, rl_train, rl_arguments(parts, tmp_path, objective=algorithm, **RESUMED | options))
    text, weights = result(tmp_path)
    one, two = ([json.loads(line) for line in lines.splitlines()] for lines in (undisturbed[algorithm][0], text))
    assert [(row["case"], row["answers"]) for row in one] == [(row["case"], row["answers"]) for row in two]
    for ours, theirs in zip(one, two, strict=True):
        assert ours["advantages"] == pytest.approx(theirs["advantages"], abs=1e-3)
    for name, weight in undisturbed[algorithm][1].items():  # Adam divides even the smallest gradient by its size
        torch.testing.assert_close(weights[name], weight, atol=2e-4, rtol=1e-4)


def test_a_finished_run_changes_nothing_and_other_rules_are_refused(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "rules"
    changed.mkdir()
    for name in ("rules.yaml", "phrases.yaml"):
        (changed / name).write_text((parts / name).read_text())
    argv = rl_arguments(parts, tmp_path / "run", objective="rloo", max_steps=2, save_strategy="steps", save_steps=1,
                        rules=changed / "rules.yaml")  # fmt: skip
    rl_train(argv)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with caplog.at_level(logging.INFO):
        rl_train(argv)
    assert "the run is finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    monkeypatch.setattr("llava.train.rollout_args.EXTRACTOR_VERSION", 999)
    with pytest.raises(LlavaError, match=r"'toy, .* extractor \d, .*', this run has 'toy, .* extractor 999, "):
        rl_train(argv)
    (changed / "rules.yaml").write_text(TOY.replace("id: toy", "id: toy\nversion: 2.0.0"))
    with pytest.raises(LlavaError, match=r"had --rules 'toy, sha256 \w+, .*', this run has 'toy 2.0.0, sha256 \w+"):
        rl_train(argv)


@pytest.mark.parametrize(("changed", "message"), [
    ({"response_len": 1000}, "row 0: .* and 2 answers of up to 1000 tokens exceed"),
    ({"query_len": 3}, "every first question is longer than --query-len 3"),
    ({"tune_mm_mlp_adapter": True, "lora_enable": False}, "does not use --tune-mm-mlp-adapter"),
    ({"ref_mode": "none", "kl_coef": 0.1}, "--ref-mode none: --kl-coef 0.1 needs a reference"),
    ({"ref_mode": "adapter_off", "lora_enable": False}, "--ref-mode adapter_off needs --lora-enable True"),
    ({"image_folder": "/nowhere"}, "row 0: .*0.png"),
    ({"version": "v0"}, r"template 'v0' ends an answer with the text .* cannot be continued; .* \(</s>\)"),
])  # fmt: skip
def test_what_a_run_refuses(parts: Path, tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(LlavaError, match=message):
        rl_train(rl_arguments(parts, tmp_path / "run", **changed))
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()


def test_epochs_count_the_cases_that_are_left(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rules = load_rules(parts / "rules.yaml")
    rows = [dialogue_row(rules, row) for row in json.loads((parts / "table.json").read_text())]
    for row in rows[2:]:
        row["conversations"][0]["value"] += " Really?" * 100
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = {"data_path": tmp_path / "rows.json", "query_len": 500, "max_steps": None, "num_train_epochs": 3}
    with caplog.at_level(logging.WARNING):
        rl_train(rl_arguments(parts, tmp_path / "run", **options))
    assert "4 of 6 cases have a longer first question" in caplog.text
    # Three epochs of 2 of the 6 cases, 2 in a rollout of 8 dialogues.
    assert [row["step"] for row in rollouts(tmp_path / "run")] == [1] * 8 + [2] * 8 + [3] * 8


def test_rules_of_one_node_are_refused(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(
        "schema: llava.rules/v1\nid: one\nnodes:\n  - {id: a, values: [x, z], extract: [{value: x, any: [x]}]}\n"
        "profiles: {X: {a: x}, Z: {a: z}}\nlabels: [{when: {label: d}, set: {a: x}}]\n"
    )
    with pytest.raises(LlavaError, match="one node; expected at least two"):
        rl_train(rl_arguments(parts, tmp_path / "run", rules=tmp_path / "one.yaml"))


@pytest.mark.parametrize(("options", "name"), [
    ({"fsdp": ["full_shard"], "hf_deepspeed_config": None}, "--fsdp"),
    ({"fsdp": None, "hf_deepspeed_config": SimpleNamespace(is_zero3=lambda: True)}, "--deepspeed with ZeRO stage 3"),
])  # fmt: skip
def test_sharded_weights_are_refused(options: dict, name: str) -> None:
    parsed = SimpleNamespace(training=SimpleNamespace(**options), model=None)
    with pytest.raises(ConfigError, match=f"{name}: answers are sampled by a whole model in each process"):
        check_setting(parsed)  # type: ignore[arg-type]
