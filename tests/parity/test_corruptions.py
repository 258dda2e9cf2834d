"""Every quantity of every oracle folder that is changed, made NaN or removed fails the comparison.

One change of each kind on the quick files; `python -m tests.support.corruptions` tries more, on all files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fidelity.folder import Oracle
from tests.support.corruptions import Corruption, corruptions, lines_after

QUICK = (
    "anyres.json", "cluster_projector.npz", "forward.npz", "grads.json", "image_keep_shapes.json",
    "image_preprocess.npz", "lora_forward.npz", "preprocess.json", "prompts.json", "tower.npz", "vit_lora_note.json",
)  # fmt: skip
FOLDERS = ("llava-1.2.2", "llava-med-1.0", "llava-med-1.5-mistral", "llava-rad", "stllava-med")
OTHERS = (
    ("llava-1.2.2", "train_log.json"),
    ("stllava-med", "train_log.json"),
    ("stllava-med", "dpo.npz"),
    ("llava-med-1.5-mistral", "questions.jsonl"),
    ("llava-med-eval", "expected_metrics.json"),
)
"""Folders and files of which one stands for the kind."""


@pytest.mark.parametrize(("folder", "check"), [*((folder, check) for check in QUICK for folder in FOLDERS), *OTHERS])
def test_every_kind_of_corruption_is_noticed(shared: Path, folder: str, check: str) -> None:
    oracle = Oracle(shared / "oracles" / folder)
    if not oracle.has(check):
        return
    tried = corruptions(oracle, check, per_kind=1)
    missed = [c for c in tried if not any(line.status == "FAIL" for line in lines_after(oracle, check, c))]
    assert len(tried) >= 2 and not missed, [(c.kind, c.where) for c in missed]


def inserted(place: int) -> Callable[[dict[str, Any]], object]:
    """Return a change of one character of a recorded prompt, counted from its end if negative."""
    return lambda case: case.update(prompt=case["prompt"][:place] + "x" + case["prompt"][place:])


RECORDED: dict[str, tuple[int, Callable[[dict[str, Any]], object]]] = {
    "first words of a prompt": (2, inserted(30)),
    "words of a prompt behind its cut": (2, inserted(-40)),
    "ids of a prompt behind its cut": (2, lambda case: case["input_ids"].__setitem__(-3, 7)),
    "a prompt that lacks its last id": (2, lambda case: case["input_ids"].pop()),
    "an unknown mode": (0, lambda case: case.update(mode="greexdy")),
    "a mode that only one case lacks": (1, lambda case: case.pop("mode")),
    "a template that only one case lacks": (2, lambda case: case.pop("template")),
    "options that contradict the mode": (0, lambda case: case.update(gen_kwargs={"num_beams": 2})),
}
"""Changes of a recorded generation: the case, and what is changed in it. The prompt of case 2 is cut at 256 tokens."""


@pytest.mark.parametrize("name", RECORDED)
def test_a_changed_setting_of_a_generation_is_noticed(shared: Path, name: str) -> None:
    oracle = Oracle(shared / "oracles" / "llava-1.2.2")
    number, change = RECORDED[name]
    assert len(oracle.json("generate.json")[2]["input_ids"]) > 256 + 40

    def apply(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        changed = json.loads(json.dumps(cases))
        change(changed[number])
        return changed

    lines = lines_after(oracle, "generate.json", Corruption("generate.json", name, str(number), apply))
    assert any(line.status == "FAIL" for line in lines)
