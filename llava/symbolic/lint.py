"""`llava rules lint`: rewards of policies that ignore the image, compared with one that is half right.

truths of a table --policies--> answers --reward--> share of what perfect answers earn, with and without balance
"""

from __future__ import annotations

import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llava.errors import DataError
from llava.symbolic.dialogues import wordings_of
from llava.symbolic.labels import assign
from llava.symbolic.rubric import LEAST_BALANCE, Priors, count_values, reward
from llava.symbolic.rules import load_rules
from llava.symbolic.settings import PRESETS
from llava.symbolic.structure import Assignment, Phrases, RuleSet
from llava.utils.cli import Parser
from llava.utils.json_rows import read_records
from llava.utils.reporting import text_table
from llava.utils.terminal import write_out

DRAWS = 200
"""Conversations that a random policy draws for each distinct truth."""

HALF_RIGHT = "half-right"

Answers = Callable[[Assignment, random.Random], list[str]]
"""Policy: the answers to all nodes, given the truth, which only `half-right` and `perfect` use."""


def policies(rules: RuleSet, phrases: Phrases, truths: Sequence[Assignment]) -> dict[str, Answers]:
    """Return the policies by name; a policy answers every node in order, also those that are not asked."""
    ids = [node.id for node in rules.nodes]
    counts = count_values(rules, truths)
    frequent = {id: max(counts[id], key=counts[id].__getitem__) for id in ids}
    constants = distinct([*truths, nearest_path(rules, frequent)])

    def said(values: Assignment) -> list[str]:
        return [phrases.answers[id][values[id]]["train"][0] for id in ids]

    def half(truth: Assignment, draw: random.Random) -> list[str]:
        others = {node.id: [value for value in node.values if value != truth[node.id]] for node in rules.nodes}
        return said({id: truth[id] if draw.random() < 0.5 else draw.choice(others[id]) for id in ids})

    def constant(path: Assignment) -> Answers:
        return lambda truth, draw: said(path)

    abstaining = {node.id: node.abstain or frequent[node.id] for node in rules.nodes}
    found: dict[str, Answers] = {
        "perfect": lambda truth, draw: said(truth),
        HALF_RIGHT: half,
        "random": lambda truth, draw: said({node.id: draw.choice(node.values) for node in rules.nodes}),
        "prior": lambda truth, draw: said(draw.choice(truths)),
        "always-abstain": constant(abstaining),
        "copied question": lambda truth, draw: [phrases.questions[id]["train"][0] for id in ids],
        "empty": lambda truth, draw: [""] * len(ids),
        "list of all values": lambda truth, draw: [", ".join(node.values) for node in rules.nodes],
        "bare label": lambda truth, draw: [frequent[id] for id in ids],
    }
    return found | {f"constant {', '.join(path.values())}": constant(path) for path in constants}


def nearest_path(rules: RuleSet, values: Assignment) -> Assignment:
    """Return the valid path that has the most of some values."""
    wanted = [values[node.id] for node in rules.nodes]
    best = max(rules.path_values, key=lambda path: sum(map(operator.eq, path, wanted)), default=wanted)
    return dict(zip((node.id for node in rules.nodes), best, strict=True))


def earned(
    rules: RuleSet, truths: Sequence[Assignment], policy: Answers, *, preset: str | None, priors: Priors | None
) -> float:
    """Return the mean raw reward of a policy over a table; no preset is the rule file's reward."""
    assert rules.phrases is not None
    ids = [node.id for node in rules.nodes]
    distinct = Counter(tuple(truth.items()) for truth in truths)
    total = 0.0
    for items, count in distinct.items():
        truth, draw = dict(items), random.Random(repr(items))
        asked = rules.asked(truth)
        if not asked:
            continue
        references = [rules.phrases.answers[id][truth[id]]["train"][0] for id in asked]
        said = (dict(zip(ids, policy(truth, draw), strict=True)) for _ in range(DRAWS))
        drawn = Counter(tuple(answers[id] for id in asked) for answers in said)
        for answers, times in drawn.items():
            found = reward(
                rules, truth=truth, asked=asked, answers=answers, references=references, preset=preset, priors=priors
            )
            total += found.raw * times / DRAWS * count
    return total / len(truths)


def lint_rows(
    rules: RuleSet, truths: Sequence[Assignment], *, preset: str | None
) -> Iterator[tuple[str, float, float]]:
    """Yield each policy with its share of the perfect reward, on the table and balanced.

    Raises:
        DataError: perfect answers earn nothing, so that no share exists.
    """
    phrases = wordings_of(rules, "train")
    priors = count_values(rules, truths)
    shares: dict[str, list[float]] = {}
    for weights in (None, priors):
        perfect = 0.0
        for name, policy in policies(rules, phrases, truths).items():
            mean = earned(rules, truths, policy, preset=preset, priors=weights)
            perfect = mean if name == "perfect" else perfect
            if perfect <= 0:
                raise DataError(
                    f"reward of {rules.id}: perfect answers earn {perfect:g}; expected more than 0. Raise reward, "
                    "correct, and use a table in which a node is asked."
                )
            shares.setdefault(name, []).append(mean / perfect)
    for name, (plain, balanced) in shares.items():
        yield name, plain, balanced


def distinct(truths: Sequence[Assignment]) -> list[Assignment]:
    """Return each assignment once, in the order of their first rows."""
    return [dict(items) for items in dict.fromkeys(tuple(truth.items()) for truth in truths)]


def too_frequent(rules: RuleSet, truths: Sequence[Assignment]) -> Iterator[str]:
    """Yield a sentence for each node with a true value too frequent for the weights of the balance."""
    for id, counts in count_values(rules, truths).items():
        seen = {value: count for value, count in counts.items() if count}
        value, most = max(seen.items(), key=lambda item: item[1], default=("", 0))
        total = sum(seen.values())
        if most * LEAST_BALANCE * len(seen) > total:
            limit = 1 / (LEAST_BALANCE * len(seen))
            yield (
                f"{id}: {most} of {total} true values are {value}, {most / total:.0%}; balance of {len(seen)} values "
                f"evens out up to {limit:.0%}"
            )


def make_parser() -> Parser:
    """Return the parser of `llava rules lint`."""
    parser = Parser(
        prog="llava rules lint", description="Compare policies that ignore the image with a half-right one."
    )
    parser.add_switch(
        "--each-case-once",
        help="use one row of each combination of true values, for a table that is not trained on, such as a test split",
    )
    parser.add_argument("file", help="rule file, or the name of a shipped rule set")
    parser.add_argument("--table", type=Path, required=True, help="rows of the training table")
    parser.add_argument("--preset", choices=list(PRESETS), help="settings of the reward; default: the rule file's")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the reward of each policy.

    Raises:
        SystemExit: status 1 if a policy earns more than the half-right one, balanced.
    """
    args = make_parser().parse_args(argv)
    rules = load_rules(args.file)
    truths = [assign(rules, row) for row in read_records(args.table)]
    if not truths:
        raise DataError(f"{args.table}: the table has no rows")
    if args.each_case_once:
        truths = distinct(truths)
    rows = list(lint_rows(rules, truths, preset=args.preset))
    half = next(balanced for name, _, balanced in rows if name == HALF_RIGHT)
    better = [name for name, _, balanced in rows if name != "perfect" and balanced > half]
    write_out(text_table(["policy", "table %", "balanced %"], [[n, 100 * a, 100 * b] for n, a, b in rows]) + "\n")
    if better:
        write_out(f"earns more than {HALF_RIGHT}: {'; '.join(better)}\n")
        for reason in too_frequent(rules, truths):
            write_out(
                f"{reason}. Add rows of other values; for a table that is not trained on, use --each-case-once.\n"
            )
        raise SystemExit(1)
