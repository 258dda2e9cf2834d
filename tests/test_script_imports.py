"""What scripts, benchmarks and mutations name in the package exists; a renamed name fails here, not in a run."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path for folder in ("scripts", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py") if path.is_file()
)


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of every import from the package or the benchmarks, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("llava", "benchmarks"):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imported_names_exist(path: Path) -> None:
    """Every name is an attribute of its module, or a module itself."""
    missing = []
    for module, name in imports(path):
        if not hasattr(importlib.import_module(module), name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                missing.append(f"{module}.{name}")
    assert missing == []


def test_every_mutation_changes_one_place() -> None:
    found = {mutation: (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) for mutation in MUTATIONS}
    assert [mutation for mutation, count in found.items() if count != 1] == []
    assert all((ROOT / test).exists() for mutation in MUTATIONS for test in mutation.tests)
