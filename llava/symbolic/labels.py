"""Values of the row of a table: counted columns, derivations from numbers, labels, then texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.errors import DataError
from llava.symbolic.expressions import exact_number, shown_value
from llava.symbolic.extract import extract
from llava.symbolic.structure import NO_MATCH, SENTINELS, Assignment, CountColumn, Label, RuleSet


def assign(rules: RuleSet, row: Mapping[str, Any]) -> Assignment:
    """Return the value of every node for one row, in the order of the nodes.

    The first true derivation sets a node; the first matching label sets the others and may not contradict it; where
    there are labels, one must fit. Texts give the value of nodes that neither sets. Nodes without a value get those of
    the only valid path that fits, if there is one.

    Raises:
        DataError: a column is missing or not usable, the row has no label, or a node stays without a value.

    Example::

        assign(rules, {"id": "case-1", "folder": "adequate_AML"})
    """
    where = f"{rules.id}, row {str(row.get('id', '?'))[:80]!r}"
    try:
        columns = {**row, **{name: _count(column, row) for name, column in rules.columns.items()}}
        derived: Assignment = {}
        for rule in rules.derive:
            if any(node not in derived for node in rule.values) and rule.condition.holds(columns):
                derived = rule.values | derived
        assigned = _with_label(rules, columns, derived)
        assigned |= {id: _read(rules, id, row) for id in rules.read if id not in assigned}
        return _completed(rules, assigned)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _count(column: CountColumn, row: Mapping[str, Any]) -> int:
    """Return the number of entries of a list field; an entry that is no object is compared as `value`."""
    if column.field not in row:
        raise DataError(f"column {column.field!r} is missing")
    entries = row[column.field]
    if not isinstance(entries, Sequence) or isinstance(entries, (str, bytes)):
        raise DataError(f"column {column.field!r} is not a list, so its entries cannot be counted")
    objects = [entry if isinstance(entry, Mapping) else {"value": entry} for entry in entries]
    return sum(all(equals(entry.get(key), wanted) for key, wanted in column.where.items()) for entry in objects)


def _read(rules: RuleSet, id: str, row: Mapping[str, Any]) -> str:
    """Return the value that a text names, the abstain value if it names none or several."""
    column, node = rules.read[id], rules.node(id)
    if column not in row:
        raise DataError(f"column {column!r} is missing")
    text = row[column]
    value = extract(node, text).value if isinstance(text, str) else NO_MATCH
    return (node.abstain or value) if value in SENTINELS else value


def _with_label(rules: RuleSet, columns: Mapping[str, Any], derived: Assignment) -> Assignment:
    """Return the derived values with those of the first label that fits."""
    if not rules.labels:
        return derived
    label = next((label for label in rules.labels if _fits(label, columns)), None)
    if label is None:
        names = dict.fromkeys(name for label in rules.labels for name in label.when)
        seen = ", ".join(f"{name} = {shown_value(columns.get(name))}" for name in names)
        raise DataError(f"no label fits ({seen})")
    for node, value in label.values.items():
        if derived.get(node, value) != value:
            raise DataError(f"the label sets {node} to {value}, but its numbers give {derived[node]}")
    return derived | label.values


def _fits(label: Label, columns: Mapping[str, Any]) -> bool:
    missing = [name for name in label.when if name not in columns]
    if missing:
        raise DataError(f"column {missing[0]!r} is missing")
    return all(equals(columns[name], wanted) for name, wanted in label.when.items())


def equals(value: Any, wanted: Sequence[str | None]) -> bool:
    """Return whether a column equals one of the wanted values: as numbers if both are, else as texts.

    True and false equal their names in any case.
    """
    if value is None:
        return None in wanted
    texts = [other for other in wanted if other is not None]
    if isinstance(value, bool):
        return str(value).lower() in map(str.lower, texts)
    number = exact_number(value)
    return str(value) in texts or (number is not None and number in map(exact_number, texts))


def _completed(rules: RuleSet, assigned: Assignment) -> Assignment:
    missing = [node.id for node in rules.nodes if node.id not in assigned]
    if missing:
        fitting = [path for path in rules.paths if assigned.items() <= path.items()]
        if not assigned or len(fitting) != 1:
            raise DataError(f"no value for {', '.join(missing)}; {len(fitting)} valid paths fit the other nodes")
        return fitting[0]
    return {node.id: assigned[node.id] for node in rules.nodes}
