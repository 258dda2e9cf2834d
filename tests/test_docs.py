"""Documents: the files and names that they mention exist, and their mixtures are valid."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

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
