"""Warnings of a rule file: what is allowed and may be a mistake."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from llava.errors import DataError
from llava.symbolic.extract import fired, normalize
from llava.symbolic.rubric import count_values, reward
from llava.symbolic.structure import Assignment, Phrases, RuleNode, RuleSet

MAX_CONSTANT = 0.6
"""Largest share of the perfect reward that always the same answers may earn."""

MAX_POLICIES, MAX_TRUTHS = 20, 200
"""Maximum number of constant policies that are tried, and most distinct truths that they are tried on."""

MAX_PATHS = 10_000
"""Maximum number of valid paths that are compared, and with which constant policies are tried.

With more, no constant policy earns much, and a comparison takes too long.
"""

MIN_ROWS = 30
"""Minimum number of rows of a table whose distribution is used; with fewer, every valid path counts once."""

MAX_SHOWN = 5
"""Maximum number of warnings of one kind about one node."""


def iter_warnings(rules: RuleSet, truths: Sequence[Assignment] = ()) -> Iterator[str]:
    """Yield the warnings of a rule set; `truths` are the assignments of a table, if there is one."""
    for node in rules.nodes:
        yield from _extraction_warnings(node)
        yield from _credit_warnings(rules, node)
    if rules.phrases is not None:
        yield from _ambiguous_questions(rules.phrases)
        for node in rules.nodes:
            yield from islice(_foreign_matches(node, rules.phrases), MAX_SHOWN)
    yield from islice(_unasked_differences(rules), MAX_SHOWN)
    yield from _constant_answers(rules, truths)


def _extraction_warnings(node: RuleNode) -> Iterator[str]:
    if not node.extract:
        yield f"node {node.id} has no extract rules: every answer counts as without a value"
        return
    named = {value for rule in node.extract for value in (rule.value, rule.negated)}
    for value in node.values:
        if value not in named:
            yield f"node {node.id}: no extract rule gives {value!r}"


def _credit_warnings(rules: RuleSet, node: RuleNode) -> Iterator[str]:
    """Yield the confusable pairs whose credit is as large as that of a right answer."""
    if not rules.reward.partial:
        return
    for (first, second), credit in node.credit.items():
        if credit >= rules.reward.correct and first < second:
            yield (
                f"node {node.id}: the credit {credit:g} of {first!r}, {second!r} is not below that of a right answer, "
                f"{rules.reward.correct:g}"
            )


def _ambiguous_questions(phrases: Phrases) -> Iterator[str]:
    """Yield the questions that are asked for several nodes."""
    nodes: dict[str, set[str]] = defaultdict(set)
    for node, splits in phrases.questions.items():
        for text in (text for texts in splits.values() for text in texts):
            nodes[normalize(text)].add(node)
    for text, found in nodes.items():
        if len(found) > 1:
            yield f"the question {text!r} is asked for several nodes: {', '.join(sorted(found))}"


def _foreign_matches(node: RuleNode, phrases: Phrases) -> Iterator[str]:
    """Yield the answers in which a pattern of another value matches, so that only a priority decides."""
    for value, splits in phrases.answers.get(node.id, {}).items():
        for text in (text for texts in splits.values() for text in texts):
            for other, pattern in fired(node, text):
                if other != value:
                    yield (
                        f"node {node.id}: the pattern {pattern!r} of {other!r} matches the answer {text!r} of {value!r}"
                    )


def _unasked_differences(rules: RuleSet) -> Iterator[str]:
    """Yield the valid paths that differ only in nodes that are not asked."""
    if len(rules.path_values) > MAX_PATHS or not any(node.ask_when for node in rules.nodes):
        return
    names = {tuple(profile.items()): name for name, profile in rules.profiles.items()}
    seen: dict[tuple[tuple[str, str], ...], str] = {}
    for path in rules.paths:
        asked = tuple((id, path[id]) for id in rules.asked(path))
        name = names.get(tuple(path.items()), ", ".join(path.values()))
        if asked in seen:
            yield f"the paths {seen[asked]} and {name} differ only in nodes that are not asked"
        seen.setdefault(asked, name)


def _constant_answers(rules: RuleSet, truths: Sequence[Assignment]) -> Iterator[str]:
    """Yield the assignment that, always given as the answers, earns too much of the perfect reward."""
    truths = truths if len(truths) >= MIN_ROWS else ()
    paths = rules.path_values
    if len(paths) > MAX_PATHS:
        return
    step = max(1, len(paths) // MAX_TRUTHS)
    ids = [node.id for node in rules.nodes]
    every = [dict(zip(ids, values, strict=True)) for values in paths[::step]]
    counts = Counter(tuple(truth.items()) for truth in (truths or every)).most_common(MAX_TRUTHS)
    priors = count_values(rules, truths) if truths else None
    tagged = replace(rules, nodes=tuple(replace(node, answer_format="tag") for node in rules.nodes))
    perfect = sum(_earned(tagged, dict(items), dict(items), priors) * n for items, n in counts)
    if perfect <= 0:
        return
    found = [
        (sum(_earned(tagged, dict(items), dict(always), priors) * n for items, n in counts) / perfect, always)
        for always, _ in counts[:MAX_POLICIES]
    ]
    share, always = max(found)
    if share > MAX_CONSTANT:
        said, where = ", ".join(value for _, value in always), "rows of the table" if truths else "valid paths"
        yield f"always answering {said} earns {100 * share:.0f} % of a perfect reward ({where})"


def _earned(
    rules: RuleSet,
    truth: Assignment,
    said: Assignment,
    priors: Mapping[str, Mapping[str, float]] | None,
) -> float:
    asked = rules.asked(truth)
    if not asked:
        return 0.0
    answers = [f"<{id}>{said[id]}</{id}>" for id in asked]
    try:
        return reward(rules, truth=truth, asked=asked, answers=answers, priors=priors).raw
    except DataError:  # the preset is for other nodes
        return 0.0
