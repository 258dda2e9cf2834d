"""Import rules: who may import whom, names that would hide an installed module, and what an import must not load."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llava"

LEVELS: dict[str, int] = {
    "constants": 0,
    "errors": 0,
    "utils": 0,
    "answer_types": 1,
    "samples": 1,
    "conversation": 1,
    "system_texts": 1,
    "tokenization": 1,
    "image_grids": 1,
    "image_processors": 1,
    "compat": 1,
    "openai_api": 1,
    "openai_connection": 1,
    "openai_failures": 1,
    "processing": 2,
    "data": 2,
    "model": 3,
    "generation": 4,
    "api": 5,
    "chat": 5,
    "train": 5,
    "eval": 5,
    "instruct": 5,
    "quickstart": 6,
    "cli": 7,
}
"""Level of every module or package directly under `llava`; the table of docs/architecture.md."""

SAME_LEVEL = {
    ("conversation", "samples"),
    ("errors", "constants"),
    ("utils", "constants"),
    ("utils", "errors"),
    ("conversation", "system_texts"),
    ("openai_api", "openai_connection"),
    ("openai_api", "openai_failures"),
    ("openai_connection", "openai_failures"),
    ("processing", "data"),
    ("data", "processing"),
}
"""Imports between two parts of one level that are meant; a processor shapes images, a data set holds a processor."""

STRANGERS = {("model", "data")}
"""Pairs that must not meet although their levels would let them."""

SCRIPT_FOLDERS = ("train", "eval", "data", "instruct", "")
"""Folders under `llava` with files that are run as scripts, which puts the folder first on the import path."""

LIGHT_MODULES = (
    "llava",
    "llava.cli",
    "llava.conversation",
    "llava.samples",
    "llava.openai_api",
    "llava.instruct.instruct_generate",
    "llava.instruct.instruct_postprocess",
    "llava.utils.bootstrap",
    "llava.utils.cli",
    "llava.utils.jsonl",
    "llava.scoring.normalize",
    "llava.eval.medvqa.metrics",
    "llava.eval.medvqa.report",
    "llava.eval.judge.cli",
    "llava.eval.eval_multimodal_chat_gpt_score",
    "llava.eval.summarize_gpt_review",
    "llava.eval.run_eval",
    "llava.eval.run_eval_batch",
)
"""Modules that import without torch and transformers."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """Return the first name under `llava` of a file: its package or module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    """Return the parts of `llava` that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            module = node.module or ""
            names.update(f"{module}.{alias.name}" if module == "llava" else module for alias in node.names)
    parts = {name.split(".")[1] for name in names if name.startswith("llava.")}
    return {part for part in parts if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()}


def test_every_part_has_a_level() -> None:
    units = {unit(path) for path in modules()} - {"__init__"}
    assert units <= LEVELS.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = unit(path)
    for other in imported_units(path) - {own}:
        allowed = (LEVELS[other] < LEVELS[own] and (own, other) not in STRANGERS) or (own, other) in SAME_LEVEL
        assert allowed, f"{path.relative_to(ROOT)} (level {LEVELS[own]}) imports llava.{other} (level {LEVELS[other]})"


def test_no_star_imports() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), f"{path}: line {node.lineno}"


def test_package_init_files_are_empty() -> None:
    listed = {PACKAGE / "__init__.py", PACKAGE / "model" / "multimodal_encoder" / "__init__.py"}
    for path in PACKAGE.rglob("__init__.py"):
        assert path in listed or not path.read_text(encoding="utf-8").strip(), f"{path} is not empty"


def test_no_module_hides_an_installed_one() -> None:
    """`python llava/train/x.py` would pick up `llava/train/copy.py` in the place of the standard library's."""
    taken = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    for folder in SCRIPT_FOLDERS:
        names = {path.stem for path in (PACKAGE / folder).glob("*.py")} | {
            path.name for path in (PACKAGE / folder).iterdir() if (path / "__init__.py").exists()
        }
        assert not (names - {"__init__"}) & taken, f"llava/{folder}"
    assert not {path.stem for path in ROOT.glob("*.py")}


def test_light_modules_load_neither_torch_nor_transformers() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT_MODULES!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers'} & sys.modules.keys()\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_file_has_more_than_400_lines() -> None:
    for path in modules():
        assert path.read_text(encoding="utf-8").count("\n") <= 400, f"{path.relative_to(ROOT)} is too long"
