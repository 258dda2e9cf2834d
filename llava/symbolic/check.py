"""Checks of a rule set: paths against profiles, phrases against extractor, rows against constraints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.symbolic.document import located
from llava.symbolic.extract import extract, normalize
from llava.symbolic.labels import assign
from llava.symbolic.rule_warnings import iter_warnings
from llava.symbolic.rules import read_rules
from llava.symbolic.structure import PREFIXES, SPLITS, Assignment, Phrases, RuleNode, RuleSet

MAX_CREDIT = 0.5
"""Largest credit of a confusable value; with more, a wrong answer could pay more than a right one."""


@dataclass(slots=True)
class Findings:
    """Result of a check: name, numbers of assignments and of valid paths, and its problems."""

    id: str = ""
    assignments: int = 0
    paths: int = 0
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_file(path: str | Path, rows: Sequence[dict[str, Any]] = (), *, table: str = "") -> Findings:
    """Return the findings of a rule file and, with rows of a `table`, of their assignments."""
    rules, errors = read_rules(path)
    found = Findings(errors=errors)
    if rules is None:
        return found
    found.id, found.assignments = rules.id, rules.num_assignments
    if errors:
        return found
    try:
        found.paths = len(rules.path_values)
    except DataError as error:
        found.errors.append(f"{path}: {error}")
        return found
    found.errors += [f"{path}: {message}" for message in _path_errors(rules)]
    found.errors += [located(Path(path), line, message) for line, message in _table_errors(rules)]
    found.errors += [f"{path}: {message}" for message in _phrase_errors(rules)]
    truths, wrong = table_truths(rules, rows)
    found.errors += [f"{table}, row {index}: {message}" for index, message in wrong]
    found.warnings += [f"{path}: {message}" for message in iter_warnings(rules, truths)]
    return found


def _path_errors(rules: RuleSet) -> Iterator[str]:
    """Yield what is wrong with paths, profiles and credits."""
    if not rules.path_values:
        yield "the constraints exclude every assignment"
        return
    order = [node.id for node in rules.nodes]
    named = {tuple(profile[node] for node in order): name for name, profile in rules.profiles.items()}
    paths = set(rules.path_values)
    if rules.constraints and named:
        for values, name in named.items():
            if values not in paths:
                broken = ", ".join(rules.violations(rules.profiles[name]))
                yield f"profile {name} breaks {broken}"
        for values in sorted(paths - named.keys())[:20]:
            yield f"the constraints allow an assignment that no profile has: {', '.join(values)}"
    for place, node in enumerate(rules.nodes):
        reached = {values[place] for values in rules.path_values}
        for value in node.values:
            if value not in reached:
                yield f"node {node.id}: no valid path has the value {value!r}"
        for (first, second), credit in node.credit.items():
            if credit > MAX_CREDIT and first < second:
                yield f"node {node.id}: credit {credit:g} for {first!r}, {second!r}; at most {MAX_CREDIT} is allowed"


def _table_errors(rules: RuleSet) -> Iterator[tuple[int, str]]:
    """Yield line and error of the labels and derivations whose values are on no valid path."""
    named = [("label", label.line, label.values) for label in rules.labels]
    named += [(f"derive {rule.id}", rule.line, rule.values) for rule in rules.derive]
    if not named or not rules.path_values:
        return
    order = [node.id for node in rules.nodes]
    paths = set(rules.path_values)
    for name, line, values in named:
        # Masks of all paths, which violations of a partial assignment needs, take seconds to make for a million.
        if tuple(values.get(node, "") for node in order) not in paths and (broken := rules.violations(values)):
            yield line, f"{name}: its values are on no valid path (they break {', '.join(broken)})"


def _phrase_errors(rules: RuleSet) -> Iterator[str]:
    """Yield missing phrases, those of both splits or with an image, and answers that are not read back."""
    file = rules.dialogue.phrases_file
    if file is None:
        return
    if rules.phrases is None:
        yield f"phrases: no such file {file.name!r}"
        return
    for node in rules.nodes:
        wordings = {"question": rules.phrases.questions.get(node.id, {})}
        answers, claims = (said.get(node.id, {}) for said in (rules.phrases.answers, rules.phrases.claims))
        wordings |= {f"answer {value!r}": answers.get(value, {}) for value in node.values}
        missing = [(name, split) for name, splits in wordings.items() for split in SPLITS if not splits.get(split)]
        yield from (f"node {node.id}: no {name} for {split}" for name, split in missing)
        wordings |= {f"claim {value!r}": splits for value, splits in claims.items()}
        for name, splits in wordings.items():
            both = set(map(normalize, splits.get("train", ()))) & set(map(normalize, splits.get("test", ())))
            yield from (f"node {node.id}: {name} {text!r} is in train and test" for text in sorted(both))
            for text in (text for texts in splits.values() for text in texts if IMAGE_TOKEN in text):
                yield f"node {node.id}: {name} {text!r} contains {IMAGE_TOKEN}, which stands for the image; omit it"
        yield from _not_read_back(node, rules.phrases, rules.dialogue.context)


def _not_read_back(node: RuleNode, phrases: Phrases, context: Mapping[str, float]) -> Iterator[str]:
    """Yield answers and claims that the extractor reads as another value, also after agreement or denial."""
    if not node.extract:
        return
    before = [prefix for name, prefix in PREFIXES.items() if context.get(name)]
    for kind, table in (("answer", phrases.answers), ("claim", phrases.claims)):
        for value, splits in table.get(node.id, {}).items():
            for text in (text for texts in splits.values() for text in texts):
                read = extract(node, text).value
                if read != value:
                    yield f"node {node.id}: the {kind} {text!r} is read as {read!r}, not as {value!r}"
                    continue
                for prefix in before if kind == "answer" else ():
                    read = extract(node, prefix + text).value
                    if read != value:
                        yield f"node {node.id}: the answer {prefix + text!r} is read as {read!r}, not as {value!r}"


def table_truths(rules: RuleSet, rows: Sequence[dict[str, Any]]) -> tuple[list[Assignment], list[tuple[int, str]]]:
    """Return the assignments of rows that have a valid one, and number and error of each other row."""
    truths: list[Assignment] = []
    wrong: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        try:
            truth = assign(rules, row)
        except DataError as error:
            wrong.append((index, str(error)))
            continue
        if broken := rules.violations(truth):
            name = str(row.get("id", "?"))[:80]
            wrong.append((index, f"the assignment of row {name!r} breaks {', '.join(broken)}"))
        else:
            truths.append(truth)
    return truths, wrong
