"""Seconds of one core for rules: the reward of 10,000 five-turn conversations, and the check of 10^6 assignments.

    python -m benchmarks.symbolic_rules

Every answer is another text, so that no cache of the extractor helps.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from llava.symbolic.check import check_file
from llava.symbolic.rubric import count_values, reward
from llava.symbolic.rules import load_rules
from llava.utils.cli import Parser
from llava.utils.reporting import text_table
from llava.utils.terminal import write_out

LIMITS = {"reward of 10,000 conversations": 3.0, "check of 1,000,000 assignments": 5.0}
"""Most seconds on one core with AVX-512."""


def reward_seconds(*, num_conversations: int = 10_000, name: str = "bone-marrow-aspirate") -> float:
    """Return the processor time of the rewards of conversations with random answers in random orders."""
    rules = load_rules(name)
    assert rules.phrases is not None
    draw = random.Random(0)
    ids = [node.id for node in rules.nodes]
    rows = []
    for number in range(num_conversations):
        truth, asked = draw.choice(rules.paths), draw.sample(ids, len(ids))
        said = [rules.phrases.answers[id][draw.choice(rules.node(id).values)]["train"][0] for id in asked]
        references = [rules.phrases.answers[id][truth[id]]["train"][0] for id in asked]
        rows.append((truth, asked, [f"{text} Case {number}." for text in said], references))
    priors = count_values(rules, [truth for truth, *_ in rows])
    start = time.process_time()
    for truth, asked, answers, references in rows:
        reward(rules, truth=truth, asked=asked, answers=answers, references=references, preset="default", priors=priors)
    return time.process_time() - start


def check_seconds(*, num_nodes: int = 6) -> float:
    """Return the processor time of the check of a file with ten values for every node, nearly all paths valid."""
    values = ", ".join(f"v{index}" for index in range(10))
    nodes = "\n".join(f"  - {{id: n{index}, values: [{values}]}}" for index in range(num_nodes))
    then = ", ".join(f"n{index}: v1" for index in range(num_nodes - 1))
    rule = f"  - {{id: c, if: {{n{num_nodes - 1}: v1}}, then: {{{then}}}}}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.yaml"
        path.write_text(f"schema: llava.rules/v1\nid: x\nnodes:\n{nodes}\nconstraints:\n{rule}\n")
        start = time.process_time()
        found = check_file(path)
        seconds = time.process_time() - start
    assert found.assignments == 10**num_nodes and found.paths == 9 * 10 ** (num_nodes - 1) + 1, found
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Print both times beside their limits."""
    Parser(prog="symbolic_rules", description="Seconds of one core for rewards and checks of rules.").parse_args(argv)
    seconds = dict(zip(LIMITS, (reward_seconds(), check_seconds()), strict=True))
    write_out(text_table(["work", "seconds", "limit"], [[name, seconds[name], LIMITS[name]] for name in LIMITS]) + "\n")


if __name__ == "__main__":
    main()
