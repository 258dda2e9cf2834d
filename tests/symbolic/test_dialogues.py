"""Dialogues of a table: orders, contexts, splits and seeds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.symbolic.dialogues import dialogue_row, main
from llava.symbolic.extract import extract
from llava.symbolic.rules import load_rules

RULES = load_rules("bone-marrow-aspirate")
NODES = [node.id for node in RULES.nodes]
STYLES = ("standard", "diagnosis_first", "shuffled", "improvised")


def row(index: int, folder: str = "adequate_AML") -> dict[str, str]:
    return {"id": f"r{index}", "image": f"{index}.png", "folder": folder, "patient": f"p{index // 2}"}


@pytest.mark.parametrize("style", STYLES)
def test_all_styles_have_the_same_truth(style: str) -> None:
    found = dialogue_row(RULES, row(3), style=style)
    assert found["truth"] == RULES.profiles["AML"] and found["group"] == "p1" and found["style"] == style
    answers = [turn["value"] for turn in found["conversations"] if turn["from"] == "gpt"]
    for node, answer in zip(found["asked"], answers, strict=True):
        assert extract(RULES.node(node), answer).value == found["truth"][node]
    assert found["conversations"][0]["value"].count("<image>") == 1


def test_orders() -> None:
    assert dialogue_row(RULES, row(0), style="standard")["asked"] == NODES
    assert dialogue_row(RULES, row(0), style="diagnosis_first")["asked"] == NODES[::-1]
    assert sorted(dialogue_row(RULES, row(0), style="shuffled")["asked"]) == sorted(NODES)


def test_improvised_sizes_are_uniform() -> None:
    sizes = Counter(len(dialogue_row(RULES, row(i), style="improvised")["asked"]) for i in range(800))
    assert sorted(sizes) == [2, 3, 4, 5]
    assert all(140 < count < 260 for count in sizes.values())  # 200 expected, standard deviation 12


@pytest.mark.parametrize(
    ("context", "prefix", "asks"),
    [("agree", "Yes, I agree. ", True), ("disagree", "No, I do not agree. ", True), ("hint_wrong", "", False)],
)
def test_contexts_keep_the_right_answer(context: str, prefix: str, asks: bool) -> None:
    rules = replace(RULES, dialogue=replace(RULES.dialogue, context={context: 1.0}))
    found = dialogue_row(rules, row(1), style="standard")
    for turn, node in enumerate(found["asked"]):
        question, answer = (found["conversations"][2 * turn + side]["value"] for side in (0, 1))
        assert ("The clinician believes that: " in question) is (asks or turn > 0)
        assert ("Do you agree?" in question) is asks and answer.startswith(prefix)
        assert extract(rules.node(node), answer).value == found["truth"][node]


def test_files_are_byte_identical(tmp_path: Path) -> None:
    table = tmp_path / "rows.json"
    table.write_text(json.dumps([row(i, folder) for i, folder in enumerate(["blood", "clot", "adequate_MM"])]))
    files = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        main(["bone-marrow-aspirate", "--table", str(table), "--out", str(file), "--seed", str(seed)])
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert len(json.loads(files[0].read_text())) == 3


def test_a_row_without_label_is_named(tmp_path: Path) -> None:
    table = tmp_path / "rows.json"
    table.write_text(json.dumps([row(0, "other")]))
    with pytest.raises(DataError, match=r"row 0: .*no label fits"):
        main(["bone-marrow-aspirate", "--table", str(table), "--out", str(tmp_path / "out.json")])


def test_rows_with_nothing_to_ask_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = tmp_path / "rows.json", tmp_path / "out.json"
    notes = [("todo", ""), ("COVID-19", ""), ("No Finding", "Lungs clear.")]
    rows = [{"id": n, "image": f"{n}.png", "label": label, "findings": text} for n, (label, text) in enumerate(notes)]
    table.write_text(json.dumps(rows))
    main(["chest-xray", "--table", str(table), "--out", str(out), "--style", "standard"])
    assert capsys.readouterr().out == f"{out}: 2 dialogues; 1 rows have nothing to ask\n"
    asked = [found["asked"] for found in json.loads(out.read_text())]
    assert asked == [["cause"], ["abnormality", "pattern", "cause"]]
