"""Commands at the end of a run: its own paths, quoted, for each kind of run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from llava.train.next_commands import next_commands


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("my images").mkdir()
    Path("my images/b.png").write_bytes(b"")
    rows = [{"id": "0"}, {"id": "1", "image": "gone.png"}, {"id": "2", "image": "b.png"}]
    Path("train.json").write_text(json.dumps(rows))
    folder = Path("runs/a run")
    folder.mkdir(parents=True)
    write(folder)
    return folder


def write(
    folder: Path, *, objective: str = "sft", rules: str | None = None, stage_1: bool = False, **data: Any
) -> None:
    arguments = {
        "model": {"tune_mm_mlp_adapter": stage_1},
        "data": {
            "data_path": "train.json", "image_folder": "my images", "eval_data_path": None, "eval_image_folder": None,
            **data,
        },
        "preference": {"objective": objective},
        "rollout": {"rules": rules},
    }  # fmt: skip
    (folder / "resolved_arguments.json").write_text(json.dumps(arguments))


def test_commands_have_the_paths_of_the_run_in_quotes(run: Path) -> None:
    assert next_commands(run) == [
        "llava chat --model 'runs/a run' --image 'my images/b.png'",
        "llava eval --model 'runs/a run' --data HELD_OUT.json --image-folder 'my images' --out 'runs/a run/eval'",
        "llava checkpoint export 'runs/a run' 'runs/a run-hf' --to hf",
    ]


def test_held_out_rows_of_the_run_are_scored(run: Path) -> None:
    write(run, eval_data_path="val.json", eval_image_folder="held out")
    words = shlex.split(next_commands(run)[1])
    assert words[words.index("--data") + 1] == "val.json"
    assert words[words.index("--image-folder") + 1] == "held out"


def test_a_projector_is_trained_further(run: Path) -> None:
    write(run, stage_1=True)
    last = "llava train --model-name-or-path 'runs/a run' --data-path TRAIN.json --image-folder 'my images'"
    assert next_commands(run)[-1] == f"{last} --output-dir 'runs/a run-tuned'"


def test_rollouts_of_rules_are_shown(run: Path) -> None:
    write(run, objective="grpo", rules="bone-marrow-aspirate")
    assert next_commands(run)[1] == "llava rules rollouts 'runs/a run' --html"


def test_a_reward_model_answers_nothing(run: Path) -> None:
    write(run, objective="reward")
    assert next_commands(run) == []


@pytest.mark.parametrize("path", ["mixture.yaml", "missing.json", "broken.json", ""])
def test_an_image_that_is_not_found_is_a_word(path: str, run: Path) -> None:
    Path("broken.json").write_text("[{")
    write(run, data_path=path)
    assert next_commands(run)[0] == "llava chat --model 'runs/a run' --image IMAGE"
