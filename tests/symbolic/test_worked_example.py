"""The worked example of docs/dr-llava.md: a file by a dermatologist, from the interview to the contradictions."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from llava.eval import run as evaluation
from llava.symbolic import check, dialogues, lint, new_rules, show
from llava.symbolic.labels import assign
from llava.symbolic.rubric import reward
from llava.symbolic.rules import load_rules
from llava.symbolic.structure import RuleSet
from llava.train.run import run_sft
from tests.support.browser import narrow_sizes
from tests.support.rollouts import rl_arguments, rollouts
from tests.support.runs import write_parts
from tests.support.tiny import tiny_image

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "dr-llava.md").read_text(encoding="utf-8")
SECTION = DOCUMENT.split("## Worked example", 1)[1].split("\n## ", 1)[0]
TRANSCRIPT, TABLE = (re.findall(rf"^```{kind}\n(.*?)^```", SECTION, re.M | re.S)[0] for kind in ("text", "json"))

STATEMENTS = ("Still without a case", "Which answers go together", "Your table has")
"""Beginnings of lines that are no questions."""


def asked() -> list[tuple[str, str]]:
    """Return the questions of the transcript, with what is typed."""
    lines = [line for line in TRANSCRIPT.splitlines() if line.strip() and not line.startswith(STATEMENTS)]
    return [(line, "") if line.endswith(":") else tuple(line.rsplit(": ", 1)) for line in lines]  # type: ignore[misc]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the example and small images."""
    folder = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("".join(f"{typed}\n" for _, typed in asked())))
        new_rules.main([str(folder / "lesions.yaml")])
    rows = json.loads(TABLE)
    (folder / "lesions.json").write_text(TABLE)
    (folder / "images").mkdir()
    for number, row in enumerate(rows):
        tiny_image(number).save(folder / "images" / row["image"])
    return folder


@pytest.fixture(scope="module")
def rules(folder: Path) -> RuleSet:
    return load_rules(folder / "lesions.yaml")


def test_the_questions_are_those_of_the_transcript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{typed}\n" for _, typed in asked())))
    new_rules.main([str(tmp_path / "lesions.yaml")])
    printed = " ".join(capsys.readouterr().out.split())
    shown = " ".join(" ".join(f"{question.rstrip(':')}:" for question, _ in asked()).split())
    for statement in [line for line in TRANSCRIPT.splitlines() if line.startswith(STATEMENTS)]:
        assert statement in printed
        printed = printed.replace(f"{statement} ", "", 1)
    assert shown in printed


def test_the_file_passes_its_checks(folder: Path) -> None:
    found = check.check_file(folder / "lesions.yaml", json.loads(TABLE), table="lesions.json")
    assert (found.assignments, found.paths, found.errors, found.warnings) == (18, 4, [], [])
    assert f"lesions: {found.assignments} assignments, {found.paths} valid paths" in SECTION
    lint.main([str(folder / "lesions.yaml"), "--table", str(folder / "lesions.json")])


def test_the_contradiction_of_the_text(rules: RuleSet) -> None:
    said = re.findall(
        r'"((?:The pigment|The\s+lesion|This is a mel)[^"]*)"', SECTION.split("a conversation that says", 1)[1]
    )
    truth = assign(rules, json.loads(TABLE)[2])
    answers = [" ".join(sentence.split()) for sentence in said]
    found = reward(rules, truth=truth, asked=["network", "veil", "diagnosis"], answers=answers)
    assert found.values == ("typical", "absent", "melanoma")
    assert found.violations == ("network-typical", "diagnosis-melanoma")


def test_the_model_trains_and_is_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parts(folder)
    words = [str(folder / "lesions.yaml"), "--table", str(folder / "lesions.json"), "--style", "standard"]
    dialogues.main([*words, "--out", str(folder / "dialogues.json")])
    assert len(json.loads((folder / "dialogues.json").read_text())) == 4
    changed = {"rules": folder / "lesions.yaml", "data_path": folder / "lesions.json", "max_steps": 1}
    changed |= {"num_generations": 2, "rollout_batch_size": 4, "response_len": 2}
    run_sft(rl_arguments(folder, folder / "grpo", **changed), image_grouping="off")
    assert {row["case"] for row in rollouts(folder / "grpo")} <= {"a", "b", "c", "d"}
    words = ["--model", str(folder / "grpo"), "--rules", str(folder / "lesions.yaml"), "--device", "cpu"]
    words += ["--data", str(folder / "lesions.json"), "--image-folder", str(folder / "images"), "--max-new-tokens", "2"]
    words += ["--num-resamples", "10", "--styles", "standard", "--hints", "none", "--no-blank-control"]
    evaluation.main([*words, "--out", str(folder / "eval")])
    assert "4 conversations (0 with wrong hints) about 4 images" in capsys.readouterr().out


def test_the_pages_fit_a_narrow_screen(folder: Path) -> None:
    show.main([str(folder / "lesions.yaml"), "--html", str(folder / "lesions.html")])
    pages = [path for path in (folder / "lesions.html", folder / "eval" / "report.html") if path.exists()]
    assert all(width <= frame <= 390 and height > 800 for width, frame, height in narrow_sizes(folder, pages))
