"""Vocabulary of the package and its documents, as `CONTRIBUTING.md` lists it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FORBIDDEN = {
    "American spelling": r"optimis|behaviour|colour|grey|licence|[a-z]{3}alis(e|ed|es|ing|ation)\b|neighbour|centre"
    r"|favour|labelled|recognis|summaris|initialis|tokenis|minimis",
    "image": r"picture|(?<![a-z])films?(?![a-z])",
    "placeholder": r"place[ _-]holder",
    "plain English": r"\banew\b|\bbesides\b|\bgoes on\b|\bin the place of\b|\blikewise\b|\bmend(s|ed|ing)?\b|\bnobody\b"
    r"|\bso many\b|\bthere is no\b|\btold\b|\bwhoever\b",
}
"""Patterns by what to write instead; they are searched in lower case, in code, comments, docstrings and messages."""

SUFFIXES = {".py", ".md", ".html", ".css"}
"""Suffixes of the files under `llava/` that are searched."""

PUBLISHED: dict[str, tuple[str, ...]] = {
    # Names that published commands, recorded results and files of older versions use.
    "docs/compatibility.md": ("`grey_padding`",),
    "docs/data.md": ("`licence`",),
    "docs/performance.md": ("--films dir", "load_grey_jpeg"),
    "llava/compat.py": ('"grey_padding"',),
    "llava/data/mixture.py": ('"licence"',),
    "llava/processing.py": ("picture = preprocess  # earlier name",),
    # Keys and rule names of JSON files.
    "llava/data/check/overlap.py": ('"same-picture"',),
    "llava/data/check/page.py": ('"same-picture"',),
    "llava/data/check/report.py": ('"pictures"',),
    "llava/data/check/rules.py": ('"same-picture"',),
    "llava/data/converters/iu_xray.py": ('"report without picture"',),
    "llava/eval/medvqa/controls.py": ('"from_picture"',),
    "llava/eval/medvqa/page.py": ('"from_picture"',),
    "llava/eval/medvqa/report.py": ('"from_picture"',),
    # Patterns that match texts of others.
    "llava/data/converters/alignment.py": ("|plain film",),
    "llava/instruct/cleaning.py": ("|picture|", "|film|"),
    # Prompts and questions: their wording determines recorded replies, tokens and scores.
    "llava/eval/judge/prompts.py": ("do not favour either side",),
    "llava/instruct/instruct_few_shot_examples.py": (
        "frontal chest film on admission",
        "the admission film",
        "right side of the picture",
        "cannot be told from the outside",
        "the centres look cellular",
    ),
    "llava/instruct/prompts.py": ("could not be told from looking", "what kind of picture it is"),
    "llava/quickstart/synthetic.py": (
        "in the picture?",
        "does the picture show",
        "what is the colour of",
        "which colour has",
        "describe the picture.",
    ),
}
"""Text that keeps its spelling, in lower case, by file."""


def documents() -> list[Path]:
    """Return every source file and document that the rules apply to."""
    sources = (path for path in (ROOT / "llava").rglob("*") if path.suffix in SUFFIXES)
    roots = (ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "data/README.md", "download_data.sh"))
    examples = (path for path in (ROOT / "examples").iterdir() if path.suffix in {".md", ".py", ".yaml"})
    return sorted([*sources, *(ROOT / "docs").rglob("*.md"), *roots, *examples])


def first_lines(path: Path) -> list[tuple[str, str]]:
    """Return the first line of every docstring of a module, with the name that it belongs to."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    texts = ((getattr(node, "name", path.stem), ast.get_docstring(node)) for node in nodes)
    return [(name, text.splitlines()[0]) for name, text in texts if text]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words(path: Path) -> None:
    text = path.read_text(encoding="utf-8").lower()
    for published in PUBLISHED.get(path.relative_to(ROOT).as_posix(), ()):
        assert published in text, f"{published!r} is listed in PUBLISHED, but the file does not contain it"
        text = text.replace(published, "")
    lines = text.splitlines()
    found = [
        f"line {number}: {match.group()!r}, see {rule!r}"
        for number, line in enumerate(lines, 1)
        for rule, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "llava").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_first_lines_of_docstrings(path: Path) -> None:
    assert not [(name, line) for name, line in first_lines(path) if len(line) > 100 or not line.endswith((".", ":"))]


def test_the_guide_lists_the_rejected_words() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("rejects these words in")[2]
    words = re.findall(r"`([a-z -]+)`", text.partition("Names that others published")[0])
    assert len(words) > 20
    whole = [word.replace("-", "normal") for word in words]  # `-alise` is an end, `optimis-` a beginning
    assert [word for word in whole if not any(re.search(rule, word) for rule in FORBIDDEN.values())] == []


def test_listed_files_exist() -> None:
    assert [path for path in PUBLISHED if not (ROOT / path).is_file()] == []
