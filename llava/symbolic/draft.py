"""Draft of a rule set: nodes as a specialist describes them, and the resulting rule and phrase files."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava.errors import DataError
from llava.symbolic.extract import normalize
from llava.symbolic.patterns import compile_pattern
from llava.symbolic.rules import SCHEMA
from llava.symbolic.structure import Allowed, Assignment, Constraint, ExtractRule, RuleNode, RuleSet


@dataclass(slots=True)
class DraftNode:
    """Node as it was described: wordings by split, words and sentences (training, test) of every value."""

    id: str
    questions: tuple[str, str]
    abstain: str = ""
    words: dict[str, list[str]] = field(default_factory=dict)
    sentences: dict[str, tuple[str, str]] = field(default_factory=dict)

    def rule_node(self) -> RuleNode:
        """Return the node with extraction rules for its words."""
        rules = tuple(
            ExtractRule(value, tuple(compile_pattern(pattern_of(word)) for word in words), self.priority(value))
            for value, words in self.words.items()
        )
        return RuleNode(self.id, tuple(self.words), abstain=self.abstain or None, extract=rules)

    def priority(self, value: str) -> float:
        """Return how many phrases of other values are part of phrases of this one; longer phrases decide."""
        others = [word for other, words in self.words.items() if other != value for word in words]
        return float(
            sum(re.search(pattern_of(other), word) is not None for other in others for word in self.words[value])
        )


def pattern_of(word: str) -> str:
    """Return the pattern of a word or phrase as a whole."""
    text = re.escape(normalize(word)).replace("\\ ", " ")
    return ("\\b" if text[:1].isalnum() else "") + text + ("\\b" if text[-1:].isalnum() else "")


@dataclass(frozen=True, slots=True)
class LabeledPaths:
    """Valid paths by name, and the entries that stand for them in a column of a table."""

    paths: dict[str, Assignment]
    column: str
    entries: dict[str, str]


def rules_text(id: str, about: dict[str, str], nodes: Sequence[DraftNode], table: LabeledPaths, phrases: str) -> str:
    """Return the rule file; `phrases` names the phrase file."""
    lines = [f"schema: {SCHEMA}", f"id: {_quoted(id)}", "version: 1.0.0"]
    lines += [f"{key}: {_quoted(text)}" for key, text in about.items() if text] + ["language: en", "nodes:"]
    for place, node in enumerate(nodes):
        lines += [f"  - id: {_quoted(node.id)}", f"    values: {_listed(node.words)}"]
        lines += [f"    abstain: {_quoted(node.abstain)}"] if node.abstain else []
        lines += ["    primary: true"] if place == len(nodes) - 1 else []
        lines.append("    extract:")
        for value, words in node.words.items():
            priority = f", priority: {node.priority(value):g}" if node.priority(value) else ""
            lines.append(f"      - {{value: {_quoted(value)}, any: {_listed(map(pattern_of, words))}{priority}}}")
    if rules := implications(nodes, list(table.paths.values())):
        lines.append("constraints:")
        lines += [
            f"  - {{id: {_quoted(rule.id)}, if: {_allowed(rule.when)}, then: {_allowed(rule.then)}}}" for rule in rules
        ]
    lines.append("profiles:")
    lines += [f"  {_quoted(name)}: {_mapped(path)}" for name, path in table.paths.items()]
    lines.append("labels:")
    lines += [
        f"  - {{when: {_mapped({table.column: table.entries[name]})}, profile: {_quoted(name)}}}"
        for name in table.paths
    ]
    turns = [min(2, len(nodes)), len(nodes)]
    lines += ["dialogue:", f"  phrases: {_quoted(phrases)}", f"  improvised_turns: {turns}"]
    return "\n".join(lines) + "\n"


def implications(nodes: Sequence[DraftNode], paths: Sequence[Assignment]) -> tuple[Constraint, ...]:
    """Return what each value implies for the other nodes, so that a contradiction has a name.

    None if implications between two nodes allow more than the paths.
    """
    found: dict[str, Constraint] = {}
    for node in nodes:
        for value in node.words:
            held = [path for path in paths if path[node.id] == value]
            then = {
                other.id: allowed
                for other in nodes
                if other is not node and len(allowed := _seen(other, held)) < len(other.words)
            }
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{node.id}-{value}")[:60]
            if then and name not in found:
                found[name] = Constraint(name, {node.id: (value,)}, then)
    rules = RuleSet(Path("draft"), "draft", "", tuple(node.rule_node() for node in nodes), tuple(found.values()))
    wanted = {tuple(path[node.id] for node in nodes) for path in paths}
    try:
        return rules.constraints if found and set(rules.path_values) == wanted else ()
    except DataError:  # too many combinations to compare
        return ()


def _seen(node: DraftNode, paths: Sequence[Assignment]) -> tuple[str, ...]:
    return tuple(value for value in node.words if any(path[node.id] == value for path in paths))


def _allowed(allowed: Allowed) -> str:
    return "{" + ", ".join(f"{_quoted(node)}: {_listed(values)}" for node, values in allowed.items()) + "}"


def phrases_text(nodes: Sequence[DraftNode]) -> str:
    """Return the phrase file."""
    source = {
        "model": "written by hand",
        "prompt_sha256": hashlib.sha256(b"").hexdigest(),
        "date": datetime.date.today().isoformat(),
    }
    lines = [f"provenance: {_mapped(source)}", "questions:"]
    lines += [f"  {_quoted(node.id)}: {_split(node.questions)}" for node in nodes]
    lines.append("answers:")
    for node in nodes:
        lines.append(f"  {_quoted(node.id)}:")
        lines += [f"    {_quoted(value)}: {_split(pair)}" for value, pair in node.sentences.items()]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _listed(texts: Iterable[str]) -> str:
    return "[" + ", ".join(_quoted(text) for text in texts) + "]"


def _mapped(pairs: dict[str, str]) -> str:
    return "{" + ", ".join(f"{_quoted(key)}: {_quoted(text)}" for key, text in pairs.items()) + "}"


def _split(pair: tuple[str, str]) -> str:
    return f"{{train: [{_quoted(pair[0])}], test: [{_quoted(pair[1])}]}}"
