"""Sections `nodes`, `constraints` and `profiles` of a rule file."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from llava.errors import DataError
from llava.symbolic.document import Item
from llava.symbolic.pattern_steps import MAX_STEPS, pattern_steps
from llava.symbolic.patterns import REMEDY, compile_pattern
from llava.symbolic.problems import Problems
from llava.symbolic.structure import SENTINELS, Allowed, Assignment, Constraint, ExtractRule, RuleNode

MAX_NODES = 64
MAX_VALUES = 64
MAX_PATTERNS = 200
"""Maximum number of nodes of a file, values of a node, and patterns of a node."""

NODE_KEYS = ("id", "values", "abstain", "primary", "confusable", "ask_when", "extract")
EXTRACT_KEYS = ("value", "any", "priority", "negatable", "negated", "only_negated")

Values = dict[str, tuple[str, ...]]
"""Values by node."""


def read_nodes(item: Item, problems: Problems, *, language: str, uncertain: str, answer_format: str) -> list[RuleNode]:
    """Return the nodes of a file, without those that cannot be used."""
    nodes: list[RuleNode] = []
    raw: list[tuple[RuleNode, Item]] = []
    patterns = _Patterns(problems)
    for part in problems.list(item, "nodes")[:MAX_NODES]:
        keys = problems.map(part, "node", NODE_KEYS)
        node = _named_node(part, keys, problems, {node.id for node in nodes})
        if node is None:
            continue
        node = replace(node, language=language, uncertain=uncertain, answer_format=answer_format)
        nodes.append(_with_details(node, keys, problems, patterns))
        raw.append((node, part))
    if isinstance(item.value, list) and len(item.value) > MAX_NODES:
        problems.add(item, f"{len(item.value)} nodes; at most {MAX_NODES} are allowed")
    if not nodes:
        problems.add(item, "nodes: expected at least one node")
    if sum(node.primary for node in nodes) > 1:
        problems.add(item, "nodes: more than one is marked as primary")
    values = {node.id: node.values for node in nodes}
    for index, (node, part) in enumerate(raw):
        asked = part.value.get("ask_when") if isinstance(part.value, dict) else None
        if asked is not None:
            when = read_allowed(asked, problems, f"node {node.id}, ask_when", values)
            nodes[index] = replace(nodes[index], ask_when=when)
    return nodes


def _named_node(part: Item, keys: dict[str, Item], problems: Problems, taken: set[str]) -> RuleNode | None:
    """Return a node with its name and values, None if they cannot be used."""
    for key in ("id", "values"):
        if key not in keys:
            problems.add(part, f"node: key {key!r} is missing")
            return None
    name = problems.slug(keys["id"], "node, id")
    if name in taken:
        problems.add(keys["id"], f"duplicate node {name!r}")
        return None
    values: list[str] = []
    for value in problems.list(keys["values"], f"node {name}, values"):
        text = problems.text(value, f"node {name}, values")
        if value.plain and text.lower() in ("true", "false"):
            problems.add(value, f"node {name}, values: unquoted {text}; write it with quotes: '{text}'")
        elif text in SENTINELS or text in values or len(text) > 64:
            problems.add(
                value, f"node {name}, values: {text[:80]!r} is reserved, repeated or longer than 64 characters"
            )
        elif text:
            values.append(text)
    if not 2 <= len(values) <= MAX_VALUES:
        problems.add(keys["values"], f"node {name}: expected 2 to {MAX_VALUES} values, got {len(values)}")
    return RuleNode(name, tuple(values)) if name and len(values) >= 2 else None


def _with_details(node: RuleNode, keys: dict[str, Item], problems: Problems, patterns: _Patterns) -> RuleNode:
    """Return a node with everything but its condition."""
    where = f"node {node.id}"
    abstain = None
    if "abstain" in keys:
        abstain = problems.choice(keys["abstain"], f"{where}, abstain", node.values) or None
    primary = problems.truth(keys["primary"], f"{where}, primary") if "primary" in keys else False
    credit: dict[tuple[str, str], float] = {}
    for pair in problems.list(keys["confusable"], f"{where}, confusable") if "confusable" in keys else []:
        parts = problems.list(pair, f"{where}, confusable")
        if len(parts) != 3:
            problems.add(pair, f"{where}, confusable: expected [value, value, credit]")
            continue
        first, second = (problems.choice(part, f"{where}, confusable", node.values) for part in parts[:2])
        number = problems.number(parts[2], f"{where}, confusable", 0, 1)
        if first == second or (first, second) in credit:
            problems.add(pair, f"{where}, confusable: the pair {first!r}, {second!r} is repeated or no pair")
        credit |= {(first, second): number, (second, first): number}
    rules = _extract_rules(keys["extract"], problems, node, patterns) if "extract" in keys else ()
    return replace(node, abstain=abstain, primary=primary, credit=credit, extract=rules)


@dataclass(slots=True)
class _Patterns:
    """Reader of the patterns of a file, all of which together take a bounded number of steps."""

    problems: Problems
    steps: float = 0.0

    def read(self, item: Item, where: str) -> tuple[re.Pattern[str], ...]:
        """Return the patterns of a list."""
        items = self.problems.list(item, f"{where}, any")
        if not items and isinstance(item.value, list):
            self.problems.add(item, f"{where}, any: the list is empty")
        return tuple(pattern for part in items if (pattern := self.compiled(part, where)) is not None)

    def compiled(self, item: Item, where: str) -> re.Pattern[str] | None:
        """Return a pattern, None if it is refused."""
        try:
            pattern = compile_pattern(self.problems.text(item, f"{where}, any"))
        except DataError as error:
            self.problems.add(item, f"{where}: {error}")
            return None
        before, self.steps = self.steps, self.steps + pattern_steps(pattern.pattern)
        if before <= MAX_STEPS < self.steps:
            self.problems.add(
                item,
                f"{where}: with pattern {pattern.pattern!r}, those of this file can take {self.steps:,.0f} steps at a "
                f"character of an answer; at most {MAX_STEPS:,} are allowed: {REMEDY}",
            )
        return pattern


def _extract_rules(item: Item, problems: Problems, node: RuleNode, reader: _Patterns) -> tuple[ExtractRule, ...]:
    where = f"node {node.id}, extract"
    rules: list[ExtractRule] = []
    for part in problems.list(item, where):
        keys = problems.map(part, where, EXTRACT_KEYS)
        missing = [key for key in ("value", "any") if key not in keys]
        if missing:
            problems.add(part, f"{where}: key {missing[0]!r} is missing")
            continue
        value = problems.choice(keys["value"], f"{where}, value", node.values)
        negated = problems.choice(keys["negated"], f"{where}, negated", node.values) if "negated" in keys else ""
        rule = ExtractRule(
            value,
            reader.read(keys["any"], where),
            priority=problems.number(keys["priority"], f"{where}, priority") if "priority" in keys else 0.0,
            negatable=problems.truth(keys["negatable"], f"{where}, negatable") if "negatable" in keys else True,
            negated=negated or None,
            only_negated=problems.truth(keys["only_negated"], where) if "only_negated" in keys else False,
        )
        if rule.only_negated and (rule.negated or not rule.negatable):
            problems.add(part, f"{where}: only_negated excludes negated and negatable: false")
        rules.append(rule)
    if sum(len(rule.patterns) for rule in rules) > MAX_PATTERNS:
        problems.add(item, f"{where}: more than {MAX_PATTERNS} patterns")
    return tuple(rules)


def read_allowed(item: Item, problems: Problems, what: str, values: Values) -> Allowed:
    """Return allowed values by node."""
    allowed: Allowed = {}
    keys = problems.map(item, what)
    for node, part in keys.items():
        if node not in values:
            problems.add(item.key_lines[node], f"{what}: unknown node {node!r}; known: {', '.join(values)}")
            continue
        allowed[node] = problems.choices(part, f"{what}, {node}", values[node])
    return allowed


def read_assignment(item: Item, problems: Problems, what: str, values: Values, *, whole: bool = False) -> Assignment:
    """Return one value by node; if `whole`, of every node."""
    keys = problems.map(item, what)
    assignment: Assignment = {}
    for node, part in keys.items():
        if node not in values:
            problems.add(item.key_lines[node], f"{what}: unknown node {node!r}; known: {', '.join(values)}")
            continue
        if value := problems.choice(part, f"{what}, {node}", values[node]):
            assignment[node] = value
    missing = [node for node in values if node not in keys]
    if whole and missing:
        problems.add(item, f"{what}: no value for {', '.join(missing)}")
    return {node: assignment[node] for node in values if node in assignment}


def read_constraints(item: Item, problems: Problems, values: Values) -> tuple[Constraint, ...]:
    """Return the constraints of a file."""
    constraints: dict[str, Constraint] = {}
    for part in problems.list(item, "constraints"):
        keys = problems.map(part, "constraint", ("id", "if", "then"))
        missing = [key for key in ("id", "then") if key not in keys]
        if missing:
            problems.add(part, f"constraint: key {missing[0]!r} is missing")
            continue
        name = problems.slug(keys["id"], "constraint, id")
        if name in constraints or name == "paths":
            problems.add(keys["id"], f"constraint {name!r} is repeated or reserved")
        where = f"constraint {name}"
        empty = "if" not in keys or keys["if"].value is None
        when = {} if empty else read_allowed(keys["if"], problems, f"{where}, if", values)
        constraints[name] = Constraint(name, when, read_allowed(keys["then"], problems, f"{where}, then", values))
    return tuple(constraints.values())


def read_profiles(item: Item, problems: Problems, values: Values) -> dict[str, Assignment]:
    """Return the profiles of a file, complete ones only."""
    profiles: dict[str, Assignment] = {}
    for name, part in problems.map(item, "profiles").items():
        profile = read_assignment(part, problems, f"profile {name}", values, whole=True)
        same = [other for other, known in profiles.items() if known == profile]
        if len(profile) == len(values):
            profiles[name] = profile
            if same:
                problems.add(part, f"profiles {same[0]} and {name} are identical")
    return profiles
