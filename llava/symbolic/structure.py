"""Rule set of one specialty: nodes with values, constraints, valid paths, labels, phrases, settings."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, DataError
from llava.symbolic.expressions import Expression
from llava.symbolic.patterns import required_texts
from llava.symbolic.settings import DEFAULT, RewardSettings

NO_MATCH = "__no_match__"
"""Value of a text that names no value of its node."""

CONFLICT = "__conflict__"
"""Value of a text that names several values of its node."""

SENTINELS = frozenset({NO_MATCH, CONFLICT})

SPLITS = ("train", "test")

PREFIXES = {"agree": "Yes, I agree. ", "disagree": "No, I do not agree. "}
"""Beginning of the answer to a clinician's right or wrong statement."""

MAX_STEPS = 5_000_000
"""Maximum number of assignments that the search for valid paths visits."""

Assignment = dict[str, str]
Allowed = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class ExtractRule:
    """Patterns that name a value.

    Attributes:
        value: value of a match.
        patterns: compiled patterns; any of them is enough.
        priority: the highest level with a match decides.
        negatable: whether a negated match counts as negated.
        negated: value of a negated match, None to drop it.
        only_negated: whether only negated matches count.
    """

    value: str
    patterns: tuple[re.Pattern[str], ...]
    priority: float = 0.0
    negatable: bool = True
    negated: str | None = None
    only_negated: bool = False


@dataclass(frozen=True, eq=False)
class RuleNode:
    """Question with a closed set of answers.

    Attributes:
        id: name.
        values: allowed values.
        abstain: value for "cannot be determined", if there is one.
        primary: whether this is the diagnosis.
        credit: credit of a confusable value, by pair (answer, truth), in both orders.
        ask_when: values of other nodes under which the question is asked.
        extract: rules that read a value from a text.
        language: language of the texts, which selects the cue lists.
        uncertain: what a hedged value counts as: `value`, `abstain` or `no_match`.
        answer_format: `text`, or `tag` for `<node>value</node>`.
    """

    id: str
    values: tuple[str, ...]
    abstain: str | None = None
    primary: bool = False
    credit: Mapping[tuple[str, str], float] = field(default_factory=dict)
    ask_when: Allowed = field(default_factory=dict)
    extract: tuple[ExtractRule, ...] = ()
    language: str = "en"
    uncertain: str = "value"
    answer_format: str = "text"

    @cached_property
    def finders(self) -> tuple[tuple[ExtractRule, tuple[str, ...]], ...]:
        """Rules, each with texts of which every match contains one; none if no such texts are known."""
        found = []
        for rule in self.extract:
            texts = [required_texts(pattern.pattern) for pattern in rule.patterns]
            found.append((rule, tuple(sorted(set().union(*texts))) if all(texts) else ()))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Constraint:
    """Implication between values; an empty condition always holds."""

    id: str
    when: Allowed
    then: Allowed


@dataclass(frozen=True, slots=True)
class CountColumn:
    """Column that counts the entries of a list field, all or those that equal `where`.

    None equals a missing key, too.
    """

    field: str
    where: dict[str, tuple[str | None, ...]]


@dataclass(frozen=True, slots=True)
class Derivation:
    """Condition over the columns of a row that sets values, and line of the file."""

    id: str
    condition: Expression
    values: Assignment
    line: int


@dataclass(frozen=True, slots=True)
class Label:
    """Values of the rows whose columns equal `when`, and line of the file.

    None stands for an empty column.
    """

    when: dict[str, tuple[str | None, ...]]
    values: Assignment
    line: int


@dataclass(frozen=True, slots=True)
class Phrases:
    """Wordings of questions and answers, by node (and value), then by split.

    Attributes:
        claims: what a clinician states about a node, by node and value; the answers where the file has none.
    """

    questions: dict[str, dict[str, tuple[str, ...]]]
    answers: dict[str, dict[str, dict[str, tuple[str, ...]]]]
    claims: dict[str, dict[str, dict[str, tuple[str, ...]]]]


@dataclass(frozen=True, slots=True)
class DialogueSettings:
    """Settings of the dialogues.

    Attributes:
        phrases_file: file of the phrases, inside the folder of the rule file.
        styles: weight of each style.
        improvised_turns: fewest and most questions of an improvised dialogue.
        context: weight of each kind of statement before the question.
        image_position: `before`, `after` or `random`.
        turns_per_image: most questions of one dialogue.
    """

    phrases_file: Path | None = None
    styles: dict[str, float] = field(
        default_factory=lambda: {"standard": 0.4, "diagnosis_first": 0.2, "shuffled": 0.2, "improvised": 0.2}
    )
    improvised_turns: tuple[int, int] = (2, 5)
    context: dict[str, float] = field(default_factory=lambda: {"none": 1.0})
    image_position: str = "before"
    turns_per_image: int | None = None


@dataclass(frozen=True, eq=False)
class RuleSet:
    """Rules of one specialty, as `load_rules` reads them.

    Attributes:
        read: column with a text from which the extractor reads the value of a node, by node.
        sha256: hash of the file.
    """

    path: Path
    id: str
    version: str
    nodes: tuple[RuleNode, ...]
    constraints: tuple[Constraint, ...] = ()
    profiles: Mapping[str, Assignment] = field(default_factory=dict)
    columns: Mapping[str, CountColumn] = field(default_factory=dict)
    derive: tuple[Derivation, ...] = ()
    labels: tuple[Label, ...] = ()
    read: Mapping[str, str] = field(default_factory=dict)
    dialogue: DialogueSettings = field(default_factory=DialogueSettings)
    phrases: Phrases | None = None
    reward: RewardSettings = DEFAULT
    info: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""

    @cached_property
    def by_id(self) -> dict[str, RuleNode]:
        """Nodes by name."""
        return {node.id: node for node in self.nodes}

    def node(self, id: str) -> RuleNode:
        """Return a node.

        Raises:
            ConfigError: no node has this name; the message lists the names.
        """
        try:
            return self.by_id[id]
        except (KeyError, TypeError):
            raise ConfigError(f"{self.id}: unknown node {id!r}; known: {', '.join(self.by_id)}") from None

    @cached_property
    def primary(self) -> RuleNode:
        """The diagnosis: the node that is marked as primary, else the last one."""
        named = self.evaluation.get("primary")
        marked = [node for node in self.nodes if node.primary]
        return self.by_id[named] if named else marked[0] if marked else self.nodes[-1]

    @property
    def files(self) -> list[Path]:
        """Files that the rules were read from."""
        phrases = self.dialogue.phrases_file
        return [self.path] if phrases is None else [self.path, phrases]

    @property
    def num_assignments(self) -> int:
        """Number of all assignments, valid or not."""
        product = 1
        for node in self.nodes:
            product *= len(node.values)
        return product

    @cached_property
    def path_values(self) -> tuple[tuple[str, ...], ...]:
        """Values of the valid assignments, in the order of the nodes.

        Raises:
            DataError: the search visits more than `MAX_STEPS` assignments.
        """
        if not self.constraints:
            return tuple(tuple(profile[node.id] for node in self.nodes) for profile in self.profiles.values())
        return tuple(_search(self.nodes, self.constraints))

    @cached_property
    def paths(self) -> tuple[Assignment, ...]:
        """Valid assignments: those that fulfill the constraints, else the profiles."""
        ids = [node.id for node in self.nodes]
        return tuple(dict(zip(ids, values, strict=True)) for values in self.path_values)

    @cached_property
    def path_masks(self) -> dict[tuple[str, str], int]:
        """Set of the paths that hold a value, as the bits of an integer, by node and value."""
        masks: dict[tuple[str, str], int] = {}
        size = len(self.path_values) // 8 + 1
        for place, node in enumerate(self.nodes):
            bits = {value: bytearray(size) for value in node.values}
            for index, path in enumerate(self.path_values):
                bits[path[place]][index >> 3] |= 1 << (index & 7)
            masks |= {(node.id, value): int.from_bytes(found, "little") for value, found in bits.items()}
        return masks

    def asked(self, truth: Mapping[str, str]) -> list[str]:
        """Return the nodes that are asked in the usual order: those whose `ask_when` the truth fulfills."""
        return [
            node.id for node in self.nodes if all(truth.get(id) in allowed for id, allowed in node.ask_when.items())
        ]

    def consistent(self, assignment: Mapping[str, str]) -> bool:
        """Return whether a valid path has all values of an assignment, which may be partial.

        Values `__no_match__` and `__conflict__` are ignored.

        Raises:
            DataError: a node or value is unknown.
        """
        left = (1 << len(self.path_values)) - 1
        for pair in self._named(assignment).items():
            left &= self.path_masks[pair]
        return left != 0

    def violations(self, assignment: Mapping[str, str]) -> list[str]:
        """Return the ids of constraints that the named nodes alone violate, or `paths` if no path fits.

        Raises:
            DataError: a node or value is unknown.
        """
        named = self._named(assignment)
        broken = [
            rule.id
            for rule in self.constraints
            if all(named.get(node) in allowed for node, allowed in rule.when.items())
            and any(node in named and named[node] not in allowed for node, allowed in rule.then.items())
        ]
        return broken or ([] if self.consistent(named) else ["paths"])

    def _named(self, assignment: Mapping[str, str]) -> Assignment:
        """Return the known values of an assignment."""
        named: Assignment = {}
        for id, value in assignment.items():
            if id not in self.by_id:
                raise DataError(f"{self.id}: unknown node {id!r}; known: {', '.join(self.by_id)}")
            if value in SENTINELS:
                continue
            if value not in self.by_id[id].values:
                known = ", ".join(self.by_id[id].values)
                raise DataError(f"{self.id}: node {id}: unknown value {value!r}; known: {known}")
            named[id] = value
        return named

    def agreement(self, asked: Sequence[str], values: Sequence[str]) -> int:
        """Return the largest number of turns that one valid path agrees with."""
        return _agreement(self, tuple(asked), tuple(values))


@lru_cache(maxsize=4096)
def _agreement(rules: RuleSet, asked: tuple[str, ...], values: tuple[str, ...]) -> int:
    # reached[k]: the paths that agree with k of the turns so far.
    reached = [(1 << len(rules.path_values)) - 1]
    for pair in zip(asked, values, strict=True):
        mask = rules.path_masks.get(pair, 0)
        more = [paths & mask for paths in reached]
        reached = [reached[0], *(a | b for a, b in zip(reached[1:], more, strict=False)), more[-1]]
    return max(count for count, paths in enumerate(reached) if paths or count == 0)


@dataclass(frozen=True, slots=True)
class _Check:
    """Implication indexed by its last node: conditions by node index, then the allowed values of another."""

    when: tuple[tuple[int, frozenset[str]], ...]
    then: int
    allowed: frozenset[str]


def _search(nodes: Sequence[RuleNode], constraints: Sequence[Constraint]) -> Iterator[tuple[str, ...]]:
    """Yield the assignments that fulfill all constraints, in the order of the values, by backtracking."""
    index = {node.id: i for i, node in enumerate(nodes)}
    checks: list[list[_Check]] = [[] for _ in nodes]
    for rule in constraints:
        when = tuple((index[node], frozenset(allowed)) for node, allowed in rule.when.items())
        for node, allowed in rule.then.items():
            last = max([index[node], *(i for i, _ in when)])
            checks[last].append(_Check(when, index[node], frozenset(allowed)))
    stack = [iter(_extensions((), nodes[0], checks[0]))]
    steps = 0
    while stack:
        values = next(stack[-1], None)
        if values is None:
            stack.pop()
            continue
        steps += 1
        if steps > MAX_STEPS:
            raise DataError(f"the search for valid paths visited {MAX_STEPS:,} assignments; add constraints")
        if len(values) == len(nodes):
            yield values
        else:
            stack.append(iter(_extensions(values, nodes[len(values)], checks[len(values)])))


def _extensions(values: tuple[str, ...], node: RuleNode, checks: Sequence[_Check]) -> list[tuple[str, ...]]:
    """Return the values with each value of the next node that fulfills the checks."""
    place = len(values)
    left: Collection[str] = node.values
    for check in checks:
        own = next((accepted for i, accepted in check.when if i == place), None)
        if any(i != place and values[i] not in accepted for i, accepted in check.when):
            continue
        if check.then != place and values[check.then] in check.allowed:
            continue
        # A value is excluded if it meets the condition and, where the check is about this node, is not allowed.
        fine = check.allowed if check.then == place else frozenset[str]()
        left = [value for value in left if value in fine or (own is not None and value not in own)]
    return [(*values, value) for value in left]
