"""Rules, rows and runs of reinforcement learning on a tiny random model."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.symbolic.rubric import Reward
from llava.train.rollout.episodes import RolloutEpisode, learned
from llava.train.rollout_args import RolloutArguments, RolloutSpec
from tests.support.runs import arguments, write_parts
from tests.support.tiny import tiny_image

TOY = r"""schema: llava.rules/v1
id: toy
nodes:
  - id: shade
    values: [dark, light]
    extract: [{value: dark, any: ['[a-m]']}, {value: light, any: ['[n-z]'], priority: 1}]
  - id: kind
    values: [cell, clot]
    extract: [{value: cell, any: ['[a-m]']}, {value: clot, any: ['[n-z]'], priority: 1}]
constraints:
  - {id: dark-cell, if: {shade: dark}, then: {kind: cell}}
  - {id: light-clot, if: {shade: light}, then: {kind: clot}}
labels:
  - {when: {label: d}, set: {shade: dark, kind: cell}}
  - {when: {label: l}, set: {shade: light, kind: clot}}
dialogue:
  phrases: phrases.yaml
  styles: {shuffled: 1}
"""

PHRASES = """provenance: {model: none, prompt_sha256: none, date: 2026-01-01}
questions:
  shade: {train: ["Dark?"], test: ["Is it dark?"]}
  kind: {train: ["Cell?"], test: ["Is it a cell?"]}
answers:
  shade: {dark: {train: ["abc"], test: ["bca"]}, light: {train: ["xyz"], test: ["yzx"]}}
  kind: {cell: {train: ["abc"], test: ["bca"]}, clot: {train: ["xyz"], test: ["yzx"]}}
"""


def spec(algorithm: str, **changed: object) -> RolloutSpec:
    found = RolloutArguments(rules="toy").spec(algorithm)
    assert found is not None
    return replace(found, **changed)  # type: ignore[arg-type]


def episode(group: int, sample: int, draw: random.Random, *, score: float | None = None) -> RolloutEpisode:
    """Return an episode of two turns with random numbers."""
    turns = [0] * draw.randrange(1, 4) + [1] * draw.randrange(1, 4)
    shares = (draw.gauss(0, 1), draw.gauss(0, 1))
    total = sum(shares) if score is None else score
    void = {name: (0.0, 0.0) for name in ("correctness", "length", "format", "void")}
    reward = Reward(
        total, sum(shares), shares, ("a", "b"), (False, True), (), {**void, "consistency": 0.5, "bonus": 0.0}
    )
    numbers = {name: [draw.gauss(0, 1) for _ in turns] for name in ("engine", "old", "reference", "values")}
    return RolloutEpisode(
        group=group, sample=sample, case="c", image="i", style="s", seed=1, asked=("x", "y"), truth=("a", "a"),
        answers=("p", "q"), finishes=("stop", "length"), reward=reward, score=total,
        shares=learned(reward, None)[1], turns=turns, **numbers,
    )  # fmt: skip


def write_toy(folder: Path, num_rows: int = 6) -> Path:
    """Write tiny parts, toy rules (`rules.yaml`), a table (`table.json`) and its images (`images/`)."""
    write_parts(folder)
    (folder / "images").mkdir()
    (folder / "rules.yaml").write_text(TOY)
    (folder / "phrases.yaml").write_text(PHRASES)
    rows = []
    for number in range(num_rows):
        tiny_image(number).save(folder / "images" / f"{number}.png")
        rows.append({"id": f"case{number}", "image": f"{number}.png", "label": "dl"[number % 2]})
    (folder / "table.json").write_text(json.dumps(rows))
    return folder


def rl_arguments(parts: Path, output: Path, **changed: object) -> list[str]:
    """Return the command line of a short run of reinforcement learning on the toy."""
    options: dict[str, object] = {
        "objective": "grpo",
        "rules": parts / "rules.yaml",
        "preset": "drllava-2024-11",
        "version": "vicuna_v1",
        "data_path": parts / "table.json",
        "image_folder": parts / "images",
        "lora_enable": True,
        "lora_r": 4,
        "num_generations": 4,
        "rollout_batch_size": 8,
        "response_len": 3,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": None,
        "per_device_train_batch_size": None,
    }
    return arguments(parts, output, **options | changed)


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """Return the episodes that a run wrote."""
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def rl_train(argv: list[str]) -> None:
    """Run a training, as a job."""
    from llava.train.run import run_sft

    run_sft(argv, image_grouping="off")


def rl_train_until_killed(argv: list[str], place: str, count: int) -> None:
    """Run a training that SIGKILL ends when a place is reached for the `count`-th time, as a job.

    Places: `written` (a rollout is on disk, before the update), `half` (a part of it is), `step` (after the update).
    """
    from llava.train.rollout import records

    def kill(reached: list[int]) -> None:
        reached.append(1)
        if len(reached) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    reached: list[int] = []
    write, step = records.RolloutWriter.__call__, records.RolloutCallback.on_optimizer_step

    def written(self: Any, found: Any, kl_coef: float) -> None:
        write(self, found, kl_coef)
        if place == "half" and len(reached) == count - 1:
            lines = self.path.read_bytes()
            self.path.write_bytes(lines[: len(lines) - 700])
        if place in ("written", "half"):
            kill(reached)

    def stepped(self: Any, *args: Any, **keywords: Any) -> None:
        step(self, *args, **keywords)
        if place == "step":
            kill(reached)

    records.RolloutWriter.__call__ = written  # type: ignore[method-assign]
    records.RolloutCallback.on_optimizer_step = stepped  # type: ignore[method-assign]
    rl_train(argv)
