"""Rule files `llava.rules/v1`: one YAML file by a specialist and its phrases, read as a `RuleSet`.

file --document--> items with lines --sections--> RuleSet, or errors with file and line
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from llava.errors import DataError
from llava.symbolic.cue_lists import languages
from llava.symbolic.document import Item, located, read_document
from llava.symbolic.problems import Problems
from llava.symbolic.read_nodes import read_constraints, read_nodes, read_profiles
from llava.symbolic.read_settings import read_dialogue, read_evaluation, read_phrases, read_reward
from llava.symbolic.read_tables import read_columns, read_derive, read_labels, read_texts
from llava.symbolic.settings import DEFAULT
from llava.symbolic.structure import DialogueSettings, Phrases, RuleSet
from llava.utils.cli import near_options

__all__ = ["RuleSet", "load_rules", "read_rules", "shipped"]

SCHEMA = "llava.rules/v1"

TEXT_KEYS = ("version", "specialty", "modality")

KEYS = (
    *("schema", "id", *TEXT_KEYS, "language", "uncertain", "answer_format", "nodes", "constraints", "profiles"),
    *("columns", "derive", "labels", "read", "dialogue", "reward", "eval"),
)

SHIPPED = Path(__file__).parent / "rulesets"


def shipped() -> dict[str, Path]:
    """Return the rule files of this package by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_rules(path: str | Path) -> RuleSet:
    """Return the rules of a file, or of a shipped rule set by its name.

    Raises:
        DataError: the file is not a valid rule file; the message names file and line.

    >>> rules = load_rules("bone-marrow-aspirate")
    >>> rules.violations({"proliferation": "blast", "diagnosis": "MM"})
    ['blast-aml']
    """
    rules, errors = read_rules(path)
    if errors or rules is None:
        more = f" (and {len(errors) - 1} more; `llava rules check {path}` lists all)" if len(errors) > 1 else ""
        raise DataError(errors[0] + more)
    return rules


def read_rules(path: str | Path) -> tuple[RuleSet | None, list[str]]:
    """Return the rules of a file, or None if a required section cannot be read, and all its errors."""
    path = Path(path)
    if not path.exists() and str(path) in shipped():
        path = shipped()[str(path)]
    if not path.exists() and not path.suffix:
        known = ", ".join(shipped())
        return None, [f"{path}: no such file or rule set{near_options([str(path)], shipped())} (shipped: {known})"]
    problems = Problems()
    try:
        root = read_document(path)
        rules = _read(root, problems, path)
    except DataError as error:
        return None, [*_located(path, problems), str(error)]
    errors = _located(path, problems)
    phrases, phrase_errors = _phrases(rules)
    errors += phrase_errors
    return replace(rules, phrases=phrases), errors


def _located(path: Path, problems: Problems) -> list[str]:
    return [located(path, line, message) for line, message in sorted(problems.found)]


def _read(root: Item, problems: Problems, path: Path) -> RuleSet:
    keys = problems.map(root, "rule file", KEYS)
    for key in ("schema", "id", "nodes"):
        if key not in keys:
            raise DataError(located(path, root.line, f"key {key!r} is missing"))
    problems.choice(keys["schema"], "schema", (SCHEMA,))
    language = problems.choice(keys["language"], "language", languages()) if "language" in keys else "en"
    nodes = read_nodes(
        keys["nodes"],
        problems,
        language=language or "en",
        uncertain=_choice(keys, problems, "uncertain", ("value", "abstain", "no_match")),
        answer_format=_choice(keys, problems, "answer_format", ("text", "tag")),
    )
    if not nodes:
        raise DataError(located(path, keys["nodes"].line, "nodes: expected at least one node"))
    values = {node.id: node.values for node in nodes}
    profiles = read_profiles(keys["profiles"], problems, values) if "profiles" in keys else {}
    constraints = read_constraints(keys["constraints"], problems, values) if "constraints" in keys else ()
    if not profiles and not constraints:
        problems.add(root, "neither `constraints` nor `profiles`: the valid paths are unknown")
    return RuleSet(
        path,
        problems.slug(keys["id"], "id"),
        problems.text(keys["version"], "version") if "version" in keys else "",
        tuple(nodes),
        constraints=constraints,
        profiles=profiles,
        columns=read_columns(keys["columns"], problems) if "columns" in keys else {},
        derive=read_derive(keys["derive"], problems, values) if "derive" in keys else (),
        labels=read_labels(keys["labels"], problems, values, profiles) if "labels" in keys else (),
        read=read_texts(keys["read"], problems, nodes) if "read" in keys else {},
        dialogue=read_dialogue(keys["dialogue"], problems, path.parent) if "dialogue" in keys else DialogueSettings(),
        reward=read_reward(keys["reward"], problems) if "reward" in keys else DEFAULT,
        info={"language": language} | {key: problems.text(keys[key], key) for key in TEXT_KEYS if key in keys},
        evaluation=read_evaluation(keys["eval"], problems, values) if "eval" in keys else {},
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _choice(keys: dict[str, Item], problems: Problems, key: str, known: tuple[str, ...]) -> str:
    """Return the value of a key, by default the first known one."""
    return (problems.choice(keys[key], key, known) if key in keys else "") or known[0]


def _phrases(rules: RuleSet) -> tuple[Phrases | None, list[str]]:
    """Return the phrases of a rule set, if its file is there, and the errors of that file."""
    path = rules.dialogue.phrases_file
    if path is None or not path.is_file():
        return None, []
    problems = Problems()
    try:
        phrases = read_phrases(read_document(path), problems, {node.id: node.values for node in rules.nodes})
    except DataError as error:
        return None, [str(error)]
    return phrases, _located(path, problems)
