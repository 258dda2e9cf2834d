"""Table of tests that were renamed, moved, split or merged between two commits.

    python -m tests.support.renamed_tests BASE [HEAD]

Every test of BASE is paired with the test of HEAD of the same name, or else with the one whose code is most alike
(names, constants and calls, weighted by how rare they are). A line is printed for each test whose file or name changed;
the last line counts them. The status is 1 when a test of BASE has no counterpart.
"""

from __future__ import annotations

import argparse
import ast
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIN_SIMILARITY = 0.35
"""Cosine of weighted code words from which two tests are the same test; 0.2 is common to any two tests of a module."""

COUNTERPARTS = {
    # Rewritten rather than renamed, so that no shared code shows the pair.
    "test_an_unknown_command_names_the_known_ones": "tests/commands/test_cli.py::"
    "test_an_unknown_command_names_similar_ones",
    # Escaping is tested for every page in tests/utils/test_pages.py.
    "test_case_is_escaped_and_shows_the_control": "tests/eval/medvqa/test_page.py::test_case_shows_the_control",
    "test_pictures_are_small_and_broken_ones_are_named": "tests/utils/test_reporting.py::test_images_are_small",
    "test_names_are_refused_where_they_do_nothing": "tests/test_compat.py::"
    "test_names_are_refused_where_they_have_no_effect",
}
"""Tests whose counterpart is stated by hand: old name -> new id."""


@dataclass(frozen=True)
class TestCode:
    """A test function: its file, its name and how often each word stands in its code."""

    path: str
    name: str
    words: Counter[str]

    def __str__(self) -> str:
        return f"{self.path}::{self.name}"


def git(*arguments: str) -> str:
    """Return the output of a git command."""
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def code_words(node: ast.AST) -> Counter[str]:
    """Count names, attributes, strings and numbers below a node."""
    words: Counter[str] = Counter()
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            words[child.id] += 1
        elif isinstance(child, ast.Attribute):
            words[child.attr] += 1
        elif isinstance(child, ast.Constant):
            words.update(str(child.value).split())
        elif isinstance(child, ast.FunctionDef):
            words.update(child.name.split("_"))
    return words


def test_functions(path: str, tree: ast.Module) -> Iterable[TestCode]:
    """Yield the test functions and methods of a parsed file."""
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for function in inside:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                yield TestCode(path, prefix + function.name, code_words(function))


def tests_at(commit: str) -> list[TestCode]:
    """Return all test functions under `tests/` at a commit."""
    paths = git("ls-tree", "-r", "--name-only", commit, "tests").splitlines()
    files = [path for path in paths if path.rsplit("/", 1)[-1].startswith("test_") and path.endswith(".py")]
    return [test for path in files for test in test_functions(path, ast.parse(git("show", f"{commit}:{path}")))]


def moved_files(base: str, head: str) -> dict[str, str]:
    """Return old path -> new path of the test files that git recognizes as moved."""
    lines = git("diff", "-M30%", "--name-status", "--diff-filter=R", base, head, "--", "tests").splitlines()
    return dict(line.split("\t")[1:3] for line in lines)


def pair_by_name(
    old: TestCode, new: dict[str, TestCode], names: dict[str, list[TestCode]], moved: str
) -> TestCode | None:
    """Return the test of the same name in the same or the moved file, or the only one of that name anywhere."""
    same = (
        new.get(COUNTERPARTS.get(old.name, "")) or new.get(f"{old.path}::{old.name}") or new.get(f"{moved}::{old.name}")
    )
    alone = names.get(old.name, [])
    return same or (alone[0] if len(alone) == 1 else None)


def most_similar(old: TestCode, candidates: list[TestCode], weights: dict[str, float]) -> tuple[float, TestCode]:
    """Return the candidate with the largest cosine of weighted words, and that cosine."""

    def norm(words: Counter[str]) -> float:
        return math.sqrt(sum((weights[word] * count) ** 2 for word, count in words.items())) or 1.0

    def cosine(test: TestCode) -> float:
        shared = old.words.keys() & test.words.keys()
        product = sum(weights[word] ** 2 * old.words[word] * test.words[word] for word in shared)
        return product / norm(old.words) / norm(test.words)

    return max(((cosine(test), test) for test in candidates), key=lambda pair: pair[0])


def table(base: str, head: str) -> list[tuple[TestCode, TestCode | None, float]]:
    """Return every test of `base` with its counterpart at `head` and the similarity (1 for equal names)."""
    old_tests, new_tests = tests_at(base), tests_at(head)
    moved = moved_files(base, head)
    by_id = {str(test): test for test in new_tests}
    names: dict[str, list[TestCode]] = {}
    for test in new_tests:
        names.setdefault(test.name, []).append(test)
    documents = Counter(word for test in old_tests + new_tests for word in test.words)
    total = len(old_tests) + len(new_tests)
    weights = {word: math.log(total / count) for word, count in documents.items()}
    rows: list[tuple[TestCode, TestCode | None, float]] = []
    for old in old_tests:
        pair = pair_by_name(old, by_id, names, moved.get(old.path, old.path))
        similarity = 1.0
        if pair is None:
            similarity, found = most_similar(old, new_tests, weights)
            pair = found if similarity >= MIN_SIMILARITY else None
        rows.append((old, pair, similarity))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head", nargs="?", default="HEAD")
    arguments = parser.parse_args(argv)
    rows = table(arguments.base, arguments.head)
    changed = [row for row in rows if str(row[0]) != str(row[1])]
    for old, new, similarity in changed:
        note = "" if similarity == 1.0 else f"  (similarity {similarity:.2f})"
        sys.stdout.write(f"{old} -> {new or 'no counterpart'}{note}\n")
    missing = sum(new is None for _, new, _ in rows)
    unchanged = len(rows) - len(changed)
    sys.stdout.write(f"{len(rows)} tests: {unchanged} unchanged, {len(changed)} renamed or moved, {missing} without\n")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
