"""Sections `columns`, `derive` and `labels` of a rule file: how the row of a table gets its values."""

from __future__ import annotations

from collections.abc import Sequence

from llava.errors import DataError
from llava.symbolic.document import Item
from llava.symbolic.expressions import is_column, parse_expression
from llava.symbolic.problems import Problems
from llava.symbolic.read_nodes import Values, read_assignment
from llava.symbolic.structure import Assignment, CountColumn, Derivation, Label, RuleNode


def read_columns(item: Item, problems: Problems) -> dict[str, CountColumn]:
    """Return the counted columns of a file."""
    columns: dict[str, CountColumn] = {}
    for name, part in problems.map(item, "columns").items():
        if not is_column(name):
            problems.add(item.key_lines[name], f"column {name!r}: expected a name of letters, digits and _")
        keys = problems.map(part, f"column {name}", ("count", "where"))
        if "count" not in keys:
            problems.add(part, f"column {name}: key 'count' is missing")
            continue
        where = {
            key: _wanted(value, problems, f"column {name}, where, {key}")
            for key, value in (problems.map(keys["where"], f"column {name}, where") if "where" in keys else {}).items()
        }
        columns[name] = CountColumn(problems.text(keys["count"], f"column {name}, count"), where)
    return columns


def _wanted(item: Item, problems: Problems, what: str) -> tuple[str | None, ...]:
    """Return one value or a list of values that a column is compared with."""
    if item.value is None:
        return (None,)
    if isinstance(item.value, list):
        if not item.value:
            problems.add(item, f"{what}: the list is empty")
        return tuple(None if part.value is None else problems.text(part, what) for part in item.value)
    return (problems.text(item, what),)


def read_derive(item: Item, problems: Problems, values: Values) -> tuple[Derivation, ...]:
    """Return the derivations of a file."""
    found: dict[str, Derivation] = {}
    for part in problems.list(item, "derive"):
        keys = problems.map(part, "derive", ("id", "from", "set"))
        missing = [key for key in ("id", "from", "set") if key not in keys]
        if missing:
            problems.add(part, f"derive: key {missing[0]!r} is missing")
            continue
        name = problems.slug(keys["id"], "derive, id")
        if name in found:
            problems.add(keys["id"], f"duplicate derivation {name!r}")
        assignment = read_assignment(keys["set"], problems, f"derive {name}, set", values)
        try:
            condition = parse_expression(problems.text(keys["from"], f"derive {name}, from"))
        except DataError as error:
            problems.add(keys["from"], f"derive {name}: {error}")
            continue
        found[name] = Derivation(name, condition, assignment, part.line)
    return tuple(found.values())


def read_labels(item: Item, problems: Problems, values: Values, profiles: dict[str, Assignment]) -> tuple[Label, ...]:
    """Return the labels of a file."""
    labels: list[Label] = []
    for part in problems.list(item, "labels"):
        keys = problems.map(part, "label", ("when", "profile", "set", "default"))
        if list(keys) == ["default"]:  # the only default of this section
            problems.choice(keys["default"], "labels, default", ("error",))
            continue
        if "when" not in keys or ("profile" in keys) == ("set" in keys) or "default" in keys:
            problems.add(part, "label: expected `when` and one of `profile` and `set`")
            continue
        when = {
            column: _wanted(value, problems, f"label, when, {column}")
            for column, value in problems.map(keys["when"], "label, when").items()
        }
        if "profile" in keys:
            name = problems.choice(keys["profile"], "label, profile", profiles)
            labels.append(Label(when, profiles.get(name, {}), part.line))
        else:
            labels.append(Label(when, read_assignment(keys["set"], problems, "label, set", values), part.line))
    return tuple(labels)


def read_texts(item: Item, problems: Problems, nodes: Sequence[RuleNode]) -> dict[str, str]:
    """Return the column with the text of each node that is read from one."""
    known = {node.id: node for node in nodes}
    columns: dict[str, str] = {}
    for id, part in problems.map(item, "read", tuple(known)).items():
        column = problems.text(part, f"read, {id}")
        if id in known and not (known[id].extract and known[id].abstain):
            problems.add(part, f"read, {id}: the node needs `extract` rules and an `abstain` value, for other texts")
        elif id in known:
            columns[id] = column
    return columns
