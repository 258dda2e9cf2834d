"""`llava rules show`: a rule file as a page for readers who do not program.

RuleSet --> drawing, paths, sentences of the constraints, phrases, an example dialogue, the reward of ten conversations
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.symbolic.dialogues import Wordings, dialogue_turns, wordings_of
from llava.symbolic.hierarchy import draw_hierarchy, plain
from llava.symbolic.rubric import Reward, reward
from llava.symbolic.rules import load_rules
from llava.symbolic.structure import SPLITS, Allowed, Assignment, Phrases, RuleNode, RuleSet
from llava.utils.cli import Parser
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import render_page, text_table
from llava.utils.terminal import write_out

MAX_PATHS = 200
"""Maximum number of valid paths of the page."""

FILLER, NUM_FILLERS = "The image has been looked at.", 50
"""Sentence that says nothing, and how often the long answers of the page have it."""

MAX_TEXT = 160
"""Maximum number of characters of an answer in the table of rewards."""


def make_parser() -> Parser:
    """Return the parser of `llava rules show`."""
    parser = Parser(prog="llava rules show", description="Show a rule file: nodes, valid paths, phrases, rewards.")
    parser.add_argument("file", help="rule file, or the name of a shipped rule set")
    parser.add_argument(
        "--html", nargs="?", const="", metavar="PAGE", help="write a page; without a name: the id of the rules, .html"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print a rule set, or write its page."""
    args = make_parser().parse_args(argv)
    rules = load_rules(args.file)
    if args.html is None:
        write_out(summary(rules) + "\n")
        return
    page = Path(args.html or f"{rules.id}.html")
    refuse_overwriting(rules.files, {"--html": page})
    write_page(rules, page)
    write_out(f"page: {page}\n")


def summary(rules: RuleSet) -> str:
    """Return nodes, constraints and valid paths as text."""
    ids = [node.id for node in rules.nodes]
    lines = [f"{rules.id}: {rules.num_assignments:,} assignments, {len(rules.path_values):,} valid paths", ""]
    lines += [text_table(["node", "values"], [[node.id, ", ".join(node.values)] for node in rules.nodes]), ""]
    lines += [f"{id}: {text}" for id, text in sentences(rules)]
    lines += ["", text_table(ids, [list(values) for values in rules.path_values[:MAX_PATHS]])]
    return "\n".join(lines)


def write_page(rules: RuleSet, path: Path) -> None:
    """Write the page of a rule set."""
    truth = example_truth(rules)
    spoken: list[dict[str, str]] = []
    tried: list[dict[str, Any]] = []
    with contextlib.suppress(DataError):  # phrases that are missing or not complete, which the check reports
        phrases = wordings_of(rules, "train")
        spoken = example_dialogue(rules, phrases, truth)
        tried = [case_row(rules, case) for case in ten_cases(rules, phrases, truth)]
    names = {tuple(profile[node.id] for node in rules.nodes): name for name, profile in rules.profiles.items()}
    shown_paths = rules.path_values[:MAX_PATHS]
    page = render_page(
        "rules.html",
        title=f"Rules: {rules.id}",
        facts=list(rules.info.items()),
        counts=f"{rules.num_assignments:,} combinations of answers, {len(rules.path_values):,} of them valid",
        drawing=draw_hierarchy(rules),
        headers=["path", *(plain(node.id) for node in rules.nodes)],
        paths=[[names.get(path, str(number)), *map(plain, path)] for number, path in enumerate(shown_paths, 1)],
        hidden=len(rules.path_values) - len(shown_paths),
        constraints=sentences(rules),
        nodes=[node_section(rules, node) for node in rules.nodes],
        truth=", ".join(f"{plain(id)}: {plain(truth[id])}" for id in rules.asked(truth)),
        dialogue=[(turn["from"], turn["value"].replace(IMAGE_TOKEN, "[image]")) for turn in spoken],
        cases=tried,
    )
    write_atomic(path, page)


def sentences(rules: RuleSet) -> list[tuple[str, str]]:
    """Return id and sentence of every constraint."""
    found = []
    for rule in rules.constraints:
        condition = f"If {_clause(rule.when, ' and ')}, then " if rule.when else "Always: "
        found.append((rule.id, condition + _clause(rule.then, "; ") + "."))
    return found


def _clause(allowed: Allowed, joiner: str) -> str:
    return joiner.join(f"{plain(node)} is {' or '.join(map(plain, values))}" for node, values in allowed.items())


def node_section(rules: RuleSet, node: RuleNode) -> dict[str, Any]:
    """Return the heading, notes and wordings of a node."""
    notes = []
    if node.id == rules.primary.id:
        notes.append("This is the diagnosis.")
    if node.abstain:
        notes.append(f"{plain(node.abstain)!r} means that it cannot be determined.")
    if node.ask_when:
        notes.append(f"Asked only if {_clause(node.ask_when, ' and ')}.")
    pairs = [(a, b, credit) for (a, b), credit in node.credit.items() if a < b]
    notes += [f"Taking {plain(a)} for {plain(b)} or the reverse earns {credit:g} of a point." for a, b, credit in pairs]
    rows: list[list[str]] = []
    if rules.phrases is not None:
        asked = rules.phrases.questions.get(node.id, {})
        said = rules.phrases.answers.get(node.id, {})
        rows = [["question", *(" / ".join(asked.get(split, ())) for split in SPLITS)]]
        rows += [[plain(v), *(" / ".join(said.get(v, {}).get(split, ())) for split in SPLITS)] for v in node.values]
    return {
        "name": plain(node.id),
        "notes": " ".join(notes),
        "values": ", ".join(map(plain, node.values)),
        "rows": rows,
    }


def example_truth(rules: RuleSet) -> Assignment:
    """Return the valid path with the most asked nodes that do not abstain.

    Raises:
        DataError: no path is valid.
    """

    def stated(path: Assignment) -> int:
        return sum(path[id] != rules.node(id).abstain for id in rules.asked(path))

    if not rules.paths:
        raise DataError(f"{rules.path}: the constraints exclude every assignment; `llava rules check` has the errors")
    return max(rules.paths[:MAX_PATHS], key=stated)


def example_dialogue(rules: RuleSet, phrases: Phrases, truth: Assignment) -> list[dict[str, str]]:
    """Return a dialogue about a truth in the usual order."""
    return dialogue_turns(Wordings(rules, phrases, "train"), truth, rules.asked(truth), random.Random(0))[0]


@dataclass(frozen=True, slots=True)
class RewardedDialogue:
    """Conversation whose reward the page shows: what it is, its answers and their reward."""

    name: str
    answers: list[str]
    found: Reward


def ten_cases(rules: RuleSet, phrases: Phrases, truth: Assignment) -> list[RewardedDialogue]:
    """Return ten conversations about one truth, from right to empty, with their rewards."""
    asked = rules.asked(truth)
    primary = rules.primary.id if rules.primary.id in asked else asked[-1]
    other = {id: next(value for value in rules.node(id).values if value != truth[id]) for id in asked}
    valid = min(rules.paths[:MAX_PATHS], key=lambda path: sum(path[id] == truth[id] for id in asked))
    abstaining = {id: rules.node(id).abstain for id in asked}

    def said(values: Assignment) -> list[str]:
        return [phrases.answers[id][values[id]]["train"][0] for id in asked]

    right = said(truth)
    num_words = NUM_FILLERS * len(FILLER.split())
    first = next((id for id in asked if id != primary), primary)
    texts = {
        "all right": right,
        "first answer wrong": said({**truth, first: other[first]}),
        "diagnosis wrong": said({**truth, primary: other[primary]}),
        "every answer wrong, without contradiction": said(valid),
        "every answer another value": said(other),
        "nothing can be determined": [
            phrases.answers[id][value]["train"][0] if value else "I do not know." for id, value in abstaining.items()
        ],
        f"right, and {num_words} words more": [" ".join([text, *[FILLER] * NUM_FILLERS]) for text in right],
        "right, but the last answer does not end": right,
        "the questions copied": [phrases.questions[id]["train"][0] for id in asked],
        "empty": [""] * len(asked),
    }
    cases = []
    for name, answers in texts.items():
        finished = [True] * (len(asked) - 1) + ["does not end" not in name]
        found = reward(rules, truth=truth, asked=asked, answers=answers, references=right, finished=finished)
        cases.append(RewardedDialogue(name, answers, found))
    return cases


def case_row(rules: RuleSet, case: RewardedDialogue) -> dict[str, Any]:
    """Return a conversation as the page shows it; the bar is in percent of its width."""
    total = case.found.total
    return {
        "name": case.name,
        "answers": " / ".join(text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..." for text in case.answers),
        "values": ", ".join(plain(value.strip("_")) for value in case.found.values),
        "broken": ", ".join(case.found.violations) or "none",
        "total": f"{total:+.2f}",
        "width": f"{min(max((total + 1) * 50, 0), 100):.1f}",
    }
