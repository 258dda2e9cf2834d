"""`llava rules check` and `llava rules score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.symbolic_rules import LIMITS, check_seconds, reward_seconds
from llava.errors import ConfigError, DataError
from llava.symbolic.check import check_file
from llava.symbolic.commands import check_main, priors_main, score_main
from llava.symbolic.dialogues import main as dialogues_main
from tests.support.rule_files import ANSWERS, CHEST, MARROW, SMEAR, rules_of, write_rules

PHRASES = {
    "provenance": {"model": "none", "prompt_sha256": "0" * 64, "date": "2026-01-01"},
    "questions": {},
    "answers": {},
}


def write_phrases(folder: Path, **changes: str) -> Path:
    """Write a rule file with phrases; `changes` replaces training answers by value."""
    rules = rules_of(folder)
    phrases: dict[str, Any] = json.loads(json.dumps(PHRASES))
    for node in rules.nodes:
        phrases["questions"][node.id] = {"train": [f"What is the {node.id}?"], "test": [f"State the {node.id}."]}
        phrases["answers"][node.id] = {
            value: {"train": [changes.get(value, ANSWERS[value])], "test": ["Seen here: " + ANSWERS[value].lower()]}
            for value in node.values
        }
    (folder / "phrases.yaml").write_text(json.dumps(phrases), encoding="utf-8")
    return write_rules(folder, MARROW + "dialogue: {phrases: phrases.yaml}\n")


def test_a_file_with_phrases_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_main([str(write_phrases(tmp_path)), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["id"], found["assignments"], found["paths"], found["errors"]) == ("marrow", 288, 5, [])


@pytest.mark.parametrize(
    ("kind", "entry", "messages"),
    [
        (
            "claims",
            {"train": ["It is AML!"], "test": ["it is  aml!"]},
            ["claim 'AML' 'it is aml!' is in train and test"],
        ),
        ("claims", {"test": ["<image> AML."]}, ["claim 'AML' '<image> AML.' contains <image>"]),
        ("answers", {"train": ["AML <image>"], "test": ["AML."]}, ["answer 'AML' 'AML <image>' contains <image>"]),
        ("questions", {"train": ["<image>What?"], "test": ["Which?"]}, ["question '<image>What?' contains <image>"]),
        ("claims", {"train": ["It is AML!"]}, []),
    ],
)
def test_wordings_of_every_kind_are_checked(
    tmp_path: Path, kind: str, entry: dict[str, list[str]], messages: list[str]
) -> None:
    path = write_phrases(tmp_path)
    phrases = json.loads((tmp_path / "phrases.yaml").read_text())
    phrases.setdefault(kind, {})
    if kind == "questions":
        phrases[kind]["diagnosis"] = entry
    else:
        phrases[kind].setdefault("diagnosis", {})["AML"] = entry
    (tmp_path / "phrases.yaml").write_text(json.dumps(phrases))
    errors = check_file(path).errors
    assert len(errors) == len(messages)
    assert all(f"node diagnosis: {message}" in error for message, error in zip(messages, errors, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AML": "This is MM."}, "'This is MM.' is read as 'MM', not as 'AML'"),
        ({"AML": "Seen here: this is aml."}, "is in train and test"),
    ],
)
def test_phrases_are_read_back(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    errors = check_file(write_phrases(tmp_path, **changes)).errors
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[blood, clot, 0.5]", "[blood, clot, 0.6]", "credit 0.6"),
        (
            "proliferation: plasma, diagnosis: MM}",
            "proliferation: plasma, diagnosis: AML}",
            "profile MM breaks plasma-mm",
        ),
        ("values: [AML, MM, healthy", "values: [AML, MM, other, healthy", "no valid path has the value 'other'"),
        ("then: {diagnosis: AML}", "then: {diagnosis: MM}", "an assignment that no profile has"),
        ("version: 1.0.0", "dialogue: {phrases: absent.yaml}", "no such file 'absent.yaml'"),
    ],
)
def test_errors_of_the_whole(tmp_path: Path, old: str, new: str, message: str) -> None:
    found = check_file(write_rules(tmp_path, MARROW.replace(old, new, 1)))
    assert any(message in error for error in found.errors), found.errors


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "labels:\n  - {when: {folder: x}, set: {proliferation: blast, diagnosis: MM}}\n",
            "line 65: label: its values are on no valid path (they break blast-aml)",
        ),
        (
            "labels:\n  - {when: {folder: y}, profile: AML}\n"
            "  - {when: {a: 1}, set: {quality: low, cell_quality: clot,\n"
            "     abnormality: inconclusive, proliferation: inconclusive, diagnosis: healthy}}\n",
            "line 66: label: its values are on no valid path (they break low-quality)",
        ),
        (
            "derive:\n  - {id: few, from: n < 5, set: {quality: low, cell_quality: adequate}}\n",
            "line 65: derive few: its values are on no valid path (they break low-quality)",
        ),
    ],
)
def test_labels_and_derivations_must_be_on_a_valid_path(tmp_path: Path, section: str, message: str) -> None:
    path = write_rules(tmp_path, MARROW.split("labels:")[0] + section)
    assert check_file(path).errors == [f"{path}, {message}"]


def test_rows_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = MARROW.replace(
        "{folder: clot}, profile: CLOT}",
        "{folder: clot}, set: {quality: high, cell_quality: clot, "
        "abnormality: absent, proliferation: none, diagnosis: healthy}}",
    )
    table = tmp_path / "rows.json"
    table.write_text(json.dumps([{"id": 1, "folder": "blood"}, {"id": 2, "folder": "clot"}, {"id": 3, "folder": "x"}]))
    with pytest.raises(SystemExit) as ended:
        check_main([str(write_rules(tmp_path, text)), "--table", str(table)])
    shown = capsys.readouterr().out
    assert ended.value.code == 1
    assert "row 1: the assignment of row '2' breaks high-quality" in shown and "row 2: " in shown
    assert "row 0" not in shown


def conversations(folder: Path, **changes: Any) -> Path:
    row = {
        "id": "a",
        "truth": {"diagnosis": "AML"},
        "asked": ["diagnosis"],
        "answers": ["AML"],
        "references": ["AML"],
        "finished": [True],
        **changes,
    }
    path = folder / "conversations.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_scores(tmp_path: Path) -> None:
    priors = tmp_path / "priors.json"
    priors.write_text(json.dumps({"diagnosis": {"AML": 1, "MM": 3}}))
    out = tmp_path / "scores.jsonl"
    arguments = ["--conversations", str(conversations(tmp_path)), "--out", str(out), "--preset", "default"]
    score_main([str(write_rules(tmp_path)), *arguments])
    row = json.loads(out.read_text())
    assert list(row) == ["id", "values", "raw", "total", "turns", "violations", "components"]
    assert (row["values"], row["raw"], row["total"]) == (["AML"], 1.5, 1.0)
    score_main([str(write_rules(tmp_path)), *arguments, "--priors", str(priors)])
    assert json.loads(out.read_text())["raw"] == 2.0 + 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": "AML"}, "row 0: key 'truth': expected an object"),
        ({"asked": ["stage"]}, "row 0: .*unknown node 'stage'"),
        ({"answers": ["AML", "MM"]}, "row 0: answers: expected 1"),
        ({"answers": [None]}, "row 0: answers: expected texts"),
    ],
)
def test_rows_that_cannot_be_scored(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = conversations(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        score_main([str(write_rules(tmp_path)), "--conversations", str(path), "--out", str(tmp_path / "out.jsonl")])


def test_priors_of_a_table(tmp_path: Path) -> None:
    table, out = tmp_path / "rows.json", tmp_path / "priors.json"
    table.write_text(json.dumps([{"folder": "blood"}, {"folder": "adequate_MM"}, {"folder": "blood"}]))
    rules = write_rules(tmp_path)
    priors_main([str(rules), "--table", str(table), "--out", str(out)])
    priors = json.loads(out.read_text())
    assert priors["cell_quality"] == {"adequate": 1, "blood": 2, "clot": 0}
    arguments = ["--conversations", str(conversations(tmp_path)), "--out", str(tmp_path / "scores.jsonl")]
    score_main([str(rules), *arguments, "--priors", str(out)])
    table.write_text(json.dumps([{"folder": "blood"}, {"folder": "x"}]))
    with pytest.raises(DataError, match="row 1: "):
        priors_main([str(rules), "--table", str(table), "--out", str(out)])


@pytest.mark.parametrize("name", ["phrases.yaml", "rules.yaml"])
def test_rules_and_phrases_are_not_overwritten(tmp_path: Path, name: str) -> None:
    path = write_phrases(tmp_path)
    table, out, before = tmp_path / "rows.json", tmp_path / name, (tmp_path / name).read_bytes()
    table.write_text(json.dumps([{"folder": "blood", "image": "a.png"}]))
    words = [str(path), "--out", str(out)]
    for run, read in (
        (score_main, ["--conversations", str(conversations(tmp_path))]),
        (priors_main, ["--table", str(table)]),
        (dialogues_main, ["--table", str(table)]),
    ):
        with pytest.raises(ConfigError, match=f"--out .*{name} would overwrite an input"):
            run([*words, *read])
    assert out.read_bytes() == before


@pytest.mark.parametrize(("context", "expected"), [("none", 0), ("agree", 2), ("disagree", 2)])
def test_answers_are_read_back_after_agreement(tmp_path: Path, context: str, expected: int) -> None:
    path = write_phrases(tmp_path)
    text = path.read_text().replace(r"'\baml\b'", "'^(seen here: )?this is aml'")
    path.write_text(text.replace("phrases.yaml}", f"phrases.yaml, context: {{{context}: 1}}}}"))
    errors = check_file(path).errors
    assert len(errors) == expected and all(
        "agree. " in e and "is read as '__no_match__', not as 'AML'" in e for e in errors
    )


@pytest.mark.parametrize(("text", "assignments", "paths"), [(MARROW, 288, 5), (SMEAR, 1728, 7), (CHEST, 96, 4)])
def test_examples_of_the_hierarchy(tmp_path: Path, text: str, assignments: int, paths: int) -> None:
    found = check_file(write_rules(tmp_path, text))
    assert (found.assignments, found.paths, found.errors) == (assignments, paths, [])


def test_the_benchmark_runs() -> None:
    assert reward_seconds(num_conversations=20) > 0 and check_seconds(num_nodes=3) > 0
    assert list(LIMITS.values()) == [3.0, 5.0]


def test_a_mistyped_rule_set_is_one_line_with_the_shipped_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_main(["bone-marow-aspirate"])
    first, last = capsys.readouterr().out.splitlines()
    assert "no such file or rule set; did you mean bone-marrow-aspirate? (shipped: " in first
    assert last == "1 error, 0 warnings"
