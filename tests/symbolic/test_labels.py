"""Values of rows: labels, counted columns, derivations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.symbolic.expressions import parse_expression
from llava.symbolic.labels import assign, equals
from llava.symbolic.rules import load_rules
from tests.support.rule_files import MARROW, rules_of, write_rules

CELLS = r"""schema: llava.rules/v1
id: cells
nodes:
  - {id: target, values: [many, some, none]}
  - {id: stage, values: [one, other]}
profiles:
  A: {target: many, stage: one}
  B: {target: some, stage: other}
  C: {target: none, stage: other}
columns:
  n_target: {count: cells, where: {type: target cell}}
  n: {count: cells}
derive:
  - {id: many, from: n_target / n > 0.5, set: {target: many}}
  - {id: some, from: n_target > 0, set: {target: some}}
  - {id: none, from: n_target == 0 and n != 0, set: {target: none}}
labels:
  - {when: {grade: 1}, set: {stage: one}}
  - {when: {grade: [2, three, null]}, set: {stage: other}}
"""


def cells(num_target: int, num: int) -> list[dict[str, str]]:
    return [{"type": "target cell"}] * num_target + [{"type": "normal"}] * (num - num_target)


def test_labels_of_a_folder(tmp_path: Path) -> None:
    rules = rules_of(tmp_path)
    assert assign(rules, {"folder": "adequate_AML_Mono"}) == rules.profiles["AML"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"cells": cells(3, 4), "grade": 1.0}, ("many", "one")),
        ({"cells": cells(3, 4), "grade": "1"}, ("many", "one")),
        ({"cells": cells(1, 4), "grade": "three"}, ("some", "other")),
        ({"cells": cells(0, 4), "grade": None}, ("none", "other")),
        ({"cells": cells(0, 4), "grade": "02"}, ("none", "other")),
    ],
)
def test_first_true_derivation_and_first_label(tmp_path: Path, row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert tuple(assign(rules_of(tmp_path, CELLS), row).values()) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"cells": [], "grade": 1}, "division by 0: column 'n'"),
        ({"grade": 1}, "column 'cells' is missing"),
        ({"cells": "abc", "grade": 1}, "column 'cells' is not a list"),
        ({"cells": cells(3, 4)}, "column 'grade' is missing"),
        ({"cells": cells(3, 4), "grade": 9}, "no label fits"),
        ({"cells": cells(3, 4), "grade": True}, r"no label fits \(grade = true\)"),
        ({"cells": cells(3, 4), "grade": "True"}, r'no label fits \(grade = "True"\)'),
        ({"cells": cells(3, 4), "grade": [2]}, r"no label fits \(grade = \[2\]\)"),
    ],
)
def test_rows_that_cannot_be_computed(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"row 'r1': .*{message}"):
        assign(rules_of(tmp_path, CELLS), {"id": "r1", **row})


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        (1.0, "1", True),
        ("01", "1", True),
        (" 2.50 ", "2.5", True),
        ("1e3", "1000", True),
        ("1_2", "12", False),
        ("1_2", "1_2", True),
        ("\u0661", "1", False),
        ("infinity", "1e999", False),
        (10000000000000001, "10000000000000000", False),
        (10000000000000001, "10000000000000001", True),
        ("10000000000000001", "1e16", False),
        (True, "True", True),
        (True, "true", True),
        (False, "FALSE", True),
        (True, "1", False),
        (1, "true", False),
        ("True", "true", False),
    ],
)
def test_columns_that_equal_an_entry(value: object, wanted: str, expected: bool) -> None:
    assert equals(value, ("other", None, wanted)) is expected
    assert equals(None, (wanted,)) is False


@pytest.mark.parametrize("spelling", ["True", "true", "TRUE", '"True"'])
def test_a_label_fits_true_in_any_spelling(tmp_path: Path, spelling: str) -> None:
    rules = rules_of(tmp_path, CELLS.replace("grade: 1}", f"grade: {spelling}}}"))
    assert assign(rules, {"cells": cells(3, 4), "grade": True})["stage"] == "one"


@pytest.mark.parametrize(("where", "num"), [("~", 2), ("[null, normal]", 3), ("normal", 1)])
def test_null_counts_entries_that_are_null_or_lack_the_key(tmp_path: Path, where: str, num: int) -> None:
    rules = rules_of(tmp_path, CELLS.replace("type: target cell", f"type: {where}").replace("> 0,", f"== {num},"))
    entries = [{"type": None}, {"size": 1}, {"type": "normal"}, {"type": "burr cell"}]
    assert assign(rules, {"cells": entries, "grade": 2})["target"] == ("many" if num > 2 else "some")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("where: {type: target cell}", "where: {type: []}", 11),
        ("when: {grade: 1}", "when: {grade: []}", 18),
    ],
)
def test_an_empty_list_of_entries_is_an_error(tmp_path: Path, old: str, new: str, line: int) -> None:
    with pytest.raises(DataError, match=rf"line {line}: .*: the list is empty"):
        load_rules(write_rules(tmp_path, CELLS.replace(old, new)))


def test_a_row_needs_a_label_even_if_numbers_give_every_value(tmp_path: Path) -> None:
    text = CELLS.replace("set: {target: many}", "set: {target: many, stage: one}")
    rules = rules_of(tmp_path, text)
    assert assign(rules, {"cells": cells(3, 4), "grade": 1})["target"] == "many"
    with pytest.raises(DataError, match=r"no label fits \(grade = 9\)"):
        assign(rules, {"cells": cells(3, 4), "grade": 9})


def test_a_label_may_not_contradict_numbers(tmp_path: Path) -> None:
    text = CELLS.replace("set: {stage: one}", "set: {stage: one, target: none}")
    with pytest.raises(DataError, match="sets target to none, but its numbers give many"):
        assign(rules_of(tmp_path, text), {"id": 1, "cells": cells(3, 4), "grade": 1})


def test_the_only_fitting_path_completes_a_row(tmp_path: Path) -> None:
    text = MARROW.replace("{folder: clot}, profile: CLOT", "{folder: clot}, set: {cell_quality: clot}")
    rules = rules_of(tmp_path, text)
    assert assign(rules, {"folder": "clot"}) == rules.profiles["CLOT"]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a / b > 0.2 and not c", None),
        ("a / b > 0.4", True),
        ("a <= 1 or b / 0 > 1", True),
        ("not (a == 1) or b ≥ 3", False),
        ("-a + b * 2 - 1 == 2", True),
        ("2 * (a + b) / 3 != 2", False),
        ("1 < a < 3", None),
        ("a", None),
        ("(a > 1) + 1 > 1", None),
        ("a ** 2 > 1", None),
        ("__import__('os')", None),
        ("(" * 33 + "a" + ")" * 33 + " > 0", None),
        ("(" * 32 + "a" + ")" * 32 + " > 0", True),
        ("a" + " + a" * 300 + " > 0", None),
        ("1e999 > a", None),
        ("a > \u00b2", None),
        ("a > 1\u00b2", None),
        ("\u00b2 > a", None),
    ],
)
def test_expressions(text: str, holds: bool | None) -> None:
    if holds is None:
        with pytest.raises(DataError, match="expression"):
            parse_expression(text)
    else:
        assert parse_expression(text).holds({"a": 1, "b": "2"}) is holds


@pytest.mark.parametrize("value", [None, "x", True, "nan", [1], float("inf"), "1_2", "\u0661", "1" * 5000, 10**400])
def test_columns_that_are_no_numbers(value: object) -> None:
    with pytest.raises(DataError, match="column 'a' is not a number"):
        parse_expression("a > 1").holds({"a": value})


@pytest.mark.parametrize("name", ["\u00b2", "\u00b2x", "and", "1x", "a-b"])
def test_names_that_no_expression_has(tmp_path: Path, name: str) -> None:
    text = CELLS.replace("columns:\n", f"columns:\n  {name}: {{count: cells}}\n")
    with pytest.raises(DataError, match=rf"line 11: column '{name}': expected a name"):
        load_rules(write_rules(tmp_path, text))


READING = """schema: llava.rules/v1
id: reading
nodes:
  - id: finding
    values: [opacity, none, unstated]
    abstain: unstated
    extract: [{value: opacity, any: ['\\bopacit\\w+'], negated: none}]
  - {id: disease, values: [pneumonia, healthy]}
constraints: [{id: healthy, if: {disease: healthy}, then: {finding: none}}]
labels:
  - {when: {label: healthy}, set: {disease: healthy, finding: none}}
  - {when: {label: p}, set: {disease: pneumonia}}
read: {finding: note}
"""


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        ({"label": "p", "note": "Two opacities."}, "opacity"),
        ({"label": "p", "note": "No opacity."}, "none"),
        ({"label": "p", "note": "An effusion."}, "unstated"),
        ({"label": "p", "note": None}, "unstated"),
        ({"label": "healthy", "note": "The opacity has gone."}, "none"),  # the label decides
    ],
)
def test_values_read_from_texts(tmp_path: Path, row: dict[str, object], finding: str) -> None:
    rules = load_rules(write_rules(tmp_path, READING))
    assert assign(rules, row)["finding"] == finding


def test_a_text_column_is_required(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'note' is missing"):
        assign(load_rules(write_rules(tmp_path, READING)), {"label": "p"})


def test_a_read_node_needs_an_abstain_value(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line \d+: read, disease: the node needs"):
        load_rules(write_rules(tmp_path, READING.replace("read: {finding", "read: {disease")))
