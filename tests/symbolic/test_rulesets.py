"""Shipped rule sets: they pass their check and the lint, and read adversarial answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llava.quickstart.synthetic import sample_smear, truth_row
from llava.symbolic.check import check_file
from llava.symbolic.extract import extract, normalize
from llava.symbolic.labels import assign
from llava.symbolic.lint import HALF_RIGHT, lint_rows, main
from llava.symbolic.rules import load_rules, shipped
from llava.utils.json_rows import read_records
from tests.support.probes import PROBES

RED_CELL_TYPES = {"normal": 18, "spherocyte": 9, "target cell": 8, "stomatocyte": 7, "hypochromia": 3, "elliptocyte": 3}
RED_CELL_TYPES |= {"ovalocyte": 3, "schistocyte": 3, "macrocyte": 2, "burr cell": 2, "microcyte": 1, "teardrop": 1}
RED_CELL_TYPES |= {"uncategorised": 1}
"""Shares like those of Chula RBC-12."""

WHITE_CELLS = {("neutrophil",): 157, ("eosinophil",): 72, ("lymphocyte",): 28, ("monocyte",): 16, ("basophil",): 3}
WHITE_CELLS |= {("neutrophil", "neutrophil"): 11}
"""Shares like those of BCCD."""

TEXTS = {"": "", "consolidation": "A consolidation.", "opacity": "Opacities.", "ground_glass": "Ground glass."}
TEXTS |= {"interstitial": "Reticular change.", "mixed": "Ground glass and consolidation.", "nodular": "Nodules."}
TEXTS |= {"clear": "Lungs clear.", "other": "An effusion."}
NOTES = {
    "COVID-19": {
        "": 103,
        "consolidation": 28,
        "opacity": 24,
        "ground_glass": 9,
        "interstitial": 6,
        "mixed": 3,
        "clear": 3,
    },
    "todo": {"": 18, "opacity": 20, "consolidation": 19, "interstitial": 6, "ground_glass": 4, "mixed": 2, "other": 6},
    "Klebsiella": {"": 15, "consolidation": 7, "opacity": 5, "nodular": 2, "clear": 2, "mixed": 1},
    "Pneumocystis": {"": 2, "interstitial": 6, "ground_glass": 1, "opacity": 1, "other": 4},
    "Varicella": {"": 2, "nodular": 4, "consolidation": 2},
    "No Finding": {"clear": 10},
}
"""Shares like those of notes about chest radiographs."""

FOLDERS = ("adequate_normal", "adequate_AML", "adequate_AML_Mono", "adequate_MM", "blood", "clot")


@pytest.mark.parametrize("name", shipped())
def test_shipped_files_pass_their_check(name: str) -> None:
    found = check_file(name)
    assert (found.errors, found.warnings) == ([], [])


@pytest.mark.parametrize("name", shipped())
def test_adversarial_answers(name: str) -> None:
    rules, probes = load_rules(name), PROBES[name]
    assert len(probes) >= 30 and {node for node, _, _ in probes} == set(rules.by_id)
    read = [(node, text, extract(rules.node(node), text).value) for node, text, _ in probes]
    assert read == probes


@pytest.mark.parametrize("name", shipped())
def test_splits_share_no_wording(name: str) -> None:
    phrases = load_rules(name).phrases
    assert phrases is not None
    answers = [splits for values in phrases.answers.values() for splits in values.values()]
    for splits in (*phrases.questions.values(), *answers):
        assert not set(map(normalize, splits["train"])) & set(map(normalize, splits["test"]))


DISEASES = {"hereditary elliptocytosis": 37, "megaloblastic anemia": 16, "thalassemia": 14, None: 20}
DISEASES |= {"iron deficiency anemia": 12, "hereditary spherocytosis": 10}
"""Smears of Chula RBC-12 by disease."""

TABLES: dict[str, list[dict[str, Any]]] = {
    "red-cell-disease": [{"disease": name} for name, count in DISEASES.items() for _ in range(count)],
    "bone-marrow-aspirate": [{"folder": folder} for folder in FOLDERS],
    "drawn-smears": [truth_row(sample_smear(seed), "a.png") for seed in range(60)],
    "red-cell-morphology": [{"type": name} for name, count in RED_CELL_TYPES.items() for _ in range(count)],
    "smear-differential": [
        {"wbc_types": list(types), "n_wbc": len(types)} for types, count in WHITE_CELLS.items() for _ in range(count)
    ],
    "chest-xray": [
        {"label": label, "findings": TEXTS[text]}
        for label, texts in NOTES.items()
        for text, count in texts.items()
        for _ in range(count)
    ],
}


@pytest.mark.parametrize("name", shipped())
def test_no_blind_policy_beats_a_half_right_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.symbolic.lint.DRAWS", 50)
    rules = load_rules(name)
    truths = [assign(rules, row) for row in TABLES[name]]
    assert not any(rules.violations(truth) for truth in truths)
    shares = {name: balanced for name, _, balanced in lint_rows(rules, truths, preset="default")}
    assert max(shares, key=lambda policy: shares[policy] if policy != "perfect" else -1) == HALF_RIGHT


def test_the_released_reward_fails_the_lint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "rows.json"
    table.write_text(json.dumps([{"id": folder, "folder": folder} for folder in FOLDERS]))
    with pytest.raises(SystemExit) as ended:
        main(["bone-marrow-aspirate", "--table", str(table), "--preset", "drllava-2024-11"])
    assert ended.value.code == 1 and "earns more than half-right: " in capsys.readouterr().out


SHARED_TABLES = [
    ("smear-differential", "blood-bccd", {"neutrophil": 130, "basophil": 3}),
    ("chest-xray", "cxr-notes", {"covid19": 137, "no_finding": 9}),
    ("red-cell-disease", "blood-rbc12", {"elliptocytosis": 32, "undetermined": 186}),
]


@pytest.mark.parametrize(("name", "folder", "counts"), SHARED_TABLES)
def test_rows_of_real_tables_have_valid_paths(name: str, folder: str, counts: dict[str, int], shared: Path) -> None:
    rules = load_rules(name)
    for split in ("train", "test"):
        found = check_file(name, list(read_records(shared / f"data/{folder}/{split}.json")), table=split)
        assert found.errors == []
    rows = read_records(shared / f"data/{folder}/train.json")
    values = Counter(assign(rules, row)[rules.primary.id] for row in rows)
    assert {value: values[value] for value in counts} == counts


@pytest.mark.parametrize("num_common", [19, 1])
def test_a_table_of_one_value_fails_and_says_why(
    num_common: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.symbolic.lint.DRAWS", 50)
    names = ["megaloblastic anemia"] * num_common + [name for name in DISEASES if name]
    table = tmp_path / "rows.json"
    table.write_text(json.dumps([{"id": str(index), "disease": name} for index, name in enumerate(names)]))
    words = ["red-cell-disease", "--table", str(table)]
    if num_common == 19:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 1
        reason = (
            "disease: 20 of 24 true values are megaloblastic, 83%; balance of 5 values evens out up to 40%. Add rows"
        )
        assert reason in capsys.readouterr().out
        words += ["--each-case-once"]
    main(words)


@pytest.mark.parametrize(("name", "folder", "counts"), SHARED_TABLES)
def test_test_splits_pass_the_lint_with_each_case_once(
    name: str, folder: str, counts: dict[str, int], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.symbolic.lint.DRAWS", 50)
    main([name, "--table", str(shared / f"data/{folder}/test.json"), "--each-case-once"])
