"""Documents: the files and names that they mention exist, and their mixtures are valid."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from llava import __version__
from llava.data.converters.dataset_cards import PATHVQA, SLAKE, VQA_RAD, DatasetCard
from llava.data.mixture import read_mixture

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "llava").rglob("*.md")),
]

FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
PATH = re.compile(r"(?<![\w./-])(?:llava|tests|benchmarks|scripts|docs)/[\w./*-]*")
LINK = re.compile(r"\]\(([^)#:]*)(#[^)]*)?\)")
YAML = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

LATER = "**later**"
"""Mark of published commands in docs/commands.md whose files must not exist yet."""


def named_paths(document: Path) -> list[str]:
    """Return the paths of the repository that a document names in backticks or code blocks."""
    lines = [line for line in document.read_text(encoding="utf-8").splitlines() if LATER not in line]
    text = "\n".join(lines)
    codes = [*FENCE.findall(text), *CODE.findall(FENCE.sub("", text))]
    return sorted({path.rstrip(".") for code in codes for path in PATH.findall(code)})


def imported_names(document: Path) -> list[tuple[str, str]]:
    """Return the modules and names that the Python blocks of a document import."""
    blocks = PYTHON.findall(document.read_text(encoding="utf-8"))
    nodes = [node for block in blocks for node in ast.parse(block).body if isinstance(node, ast.ImportFrom)]
    return [(node.module or "", alias.name) for node in nodes for alias in node.names]


def anchor_of(heading: str) -> str:
    """Return the anchor that Markdown renderers give a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


PATHS = [(document.name, path) for document in DOCUMENTS for path in named_paths(document)]
LINKS = [
    (document, target, anchor)
    for document in DOCUMENTS
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8"))
]
IMPORTS = [found for document in DOCUMENTS for found in imported_names(document)]
MIXTURES = [text for document in DOCUMENTS for text in YAML.findall(document.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("document", "path"), PATHS, ids=[f"{name}:{path}" for name, path in PATHS])
def test_named_path_exists(document: str, path: str) -> None:
    assert (ROOT / path).exists() or list(ROOT.glob(path)), f"{document} names {path}"


@pytest.mark.parametrize(
    ("document", "target", "anchor"), LINKS, ids=[f"{d.name}:{target}{anchor}" for d, target, anchor in LINKS]
)
def test_link_leads_to_a_heading(document: Path, target: str, anchor: str) -> None:
    page = document.parent / target if target else document
    assert page.is_file(), f"{document.name} links to {target}"
    if anchor:
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor[1:] in map(anchor_of, headings)


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_imported_name_exists(module: str, name: str) -> None:
    folder = ROOT / module.replace(".", "/")
    if folder.is_dir():
        assert (folder / f"{name}.py").is_file()
        return
    defined = rf"^(def|class) {name}\b|^{name}\b.*=|^    \"{name}\",$"
    assert re.search(defined, folder.with_suffix(".py").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("text", MIXTURES)
def test_mixture_example_is_valid(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mixture.yaml"
    file.write_text(text, encoding="utf-8")
    assert len(read_mixture(file).sources) == 2


def test_architecture_names_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.name for path in (ROOT / "llava").glob("*/__init__.py")}
    assert [name for name in sorted(packages) if f"llava/{name}/" not in text] == []


def test_the_scores_of_the_readme_are_results() -> None:
    """Every score with an interval, and every ratio of the table of speed, is in the document that it is taken from."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    scores = re.findall(r"\d+\.\d \[-?\d+\.\d, \d+\.\d\]", text)
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert len(scores) >= 9 and [score for score in scores if score not in results] == []
    ratios = [float(number) for number in re.findall(r" (\d+\.\d+) (?=\|)", text.partition("## Speed")[2])]
    speed = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    measured = {round(float(number), 1) for number in re.findall(r"\d+\.\d+", speed)}
    assert len(ratios) >= 5 and {round(ratio, 1) for ratio in ratios} <= measured


@pytest.mark.parametrize(
    ("folder", "card", "variant"),
    [("vqa-rad", VQA_RAD, "public"), ("slake", SLAKE, "en"), ("pathvqa", PATHVQA, "json")],
)
def test_sizes_of_the_data_readme_are_the_published_ones(folder: str, card: DatasetCard, variant: str) -> None:
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    [row] = [line for line in text.splitlines() if line.startswith(f"| `{folder}/`")]
    assert card.sizes[variant] and all(f"{size.rows:,}" in row for size in card.sizes[variant].values())


def test_the_extras_that_can_be_installed_are_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    [named] = re.findall(r"one or more of the extras `([\w ]+)`", text)
    assert set(named.split()) == project["optional-dependencies"].keys()


def test_the_citation_has_the_version_and_the_workflow_runs_the_tests() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and len(citation["references"]) == 4
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    assert "bash .ci/run" in [step.get("run") for step in steps["steps"]]
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
