"""Import rules: who may import whom, names that would hide an installed module, and what an import must not load."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llava"

ROWS = re.compile(r"^\| (\d) \| (.*?) \| ", re.MULTILINE)
LEVELS: dict[str, int] = {
    name: int(level)
    for level, parts in ROWS.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    for name in re.findall(r"`(\w+)`", parts)
}
"""Level of every module or package directly under `llava`; the table of docs/architecture.md."""

SAME_LEVEL = {
    ("errors", "constants"),
    ("utils", "constants"),
    ("utils", "errors"),
    ("chat_template", "samples"),
    ("conversation", "chat_template"),
    ("conversation", "samples"),
    ("conversation", "system_prompts"),
    ("conversation", "template_forms"),
    ("jinja_template", "chat_families"),
    ("jinja_template", "chat_template"),
    ("jinja_template", "conversation"),
    ("jinja_template", "samples"),
    ("published_chat", "conversation"),
    ("published_chat", "samples"),
    ("published_chat", "template_forms"),
    ("symbolic", "openai_api"),
    ("openai_api", "openai_transport"),
    ("processing", "imaging"),
    ("data", "imaging"),
    ("data", "processing"),
}
"""Allowed imports between two parts of one level."""

FORBIDDEN = {("model", "data")}
"""Imports that the levels allow and the architecture does not."""

SCRIPT_FOLDERS = ("train", "eval", "data", "instruct", "serve", "")
"""Folders under `llava` with files that are run as scripts, which puts the folder first on the import path."""

LIGHT_MODULES = (
    "llava",
    "llava.cli",
    "llava.conversation",
    "llava.samples",
    "llava.openai_api",
    "llava.instruct.instruct_generate",
    "llava.instruct.instruct_postprocess",
    "llava.data.check.cli",
    "llava.data.converters.vqa_rad",
    "llava.eval.answering",
    "llava.eval.medvqa.cli",
    "llava.generation.options",
    "llava.judging.store",
    "llava.model.checkpoint.tools.doctor",
    "llava.scoring.overlap",
    "llava.serve.cli",
    "llava.serve.run",
    "llava.train.command",
    "llava.train.compare",
    "llava.train.run_page",
    "llava.symbolic.commands",
    "llava.report_labels.labeler",
    "llava.eval.run",
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
        allowed = (LEVELS[other] < LEVELS[own] and (own, other) not in FORBIDDEN) or (own, other) in SAME_LEVEL
        assert allowed, f"{path.relative_to(ROOT)} (level {LEVELS[own]}) imports llava.{other} (level {LEVELS[other]})"


def components(module: str) -> str:
    """Return the first two names of a module below `llava`: a folder of the second level, or one module."""
    return ".".join(module.split(".")[:3])


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Return who imports whom, two levels deep; imports inside functions and under TYPE_CHECKING count."""
    names = {module_name(path) for path in modules()}
    graph: dict[str, set[str]] = {}
    for path in modules():
        own = components(module_name(path))
        targets = graph.setdefault(own, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = [
                    full if (full := f"{node.module}.{alias.name}") in names else node.module for alias in node.names
                ]
            targets |= {components(name) for name in found if name.startswith("llava.")} - {own}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a cycle, or nothing."""
    done: set[str] = set()

    def visit(node: str, above: list[str]) -> list[str]:
        if node in above:
            return [*above[above.index(node) :], node]
        if node not in done:
            for target in sorted(graph.get(node, ())):
                if found := visit(target, [*above, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_a_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_cycle_two_levels_deep() -> None:
    graph = import_graph()
    assert len(graph) > 100
    assert not (found := cycle(graph)), " -> ".join(found)


ARGUMENT_CLASSES = {
    "ModelArguments",
    "DataArguments",
    "LegacyTrainingArguments",
    "LlavaTrainingArguments",
    "Parsed",
}
ARGUMENT_NAMES = {"args", "model_args", "data_args", "training", "parsed", "processor", "hooks"}
"""Names of arguments, processors and hooks."""


def identifiers(path: Path) -> set[str]:
    """Return the names that a file imports, defines or reads."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) | ast.ClassDef(name=name):
                found.add(name)
    return found


def changed_attributes(source: str) -> list[str]:
    """Return the assignments in a source text to attributes of arguments, processors and hooks."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
            if owner in ARGUMENT_NAMES:
                found.append(ast.unparse(node))
    return found


def test_only_the_entry_of_training_uses_the_argument_classes() -> None:
    users = {path.relative_to(PACKAGE).as_posix() for path in modules() if identifiers(path) & ARGUMENT_CLASSES}
    entries = {"run", "run_start", "rollout/run", "score_preferences"}
    parsing = {"args", "parsed", "parsing", "option_parser", "legacy_flags", "write_option_table"}
    assert users == {f"train/{name}.py" for name in entries | parsing}


def test_a_changed_attribute_is_found() -> None:
    assert changed_attributes("args.a = 1\nself.hooks.b |= 2\nself.args, other.c = args.d, 3") == [
        "args.a",
        "self.hooks.b",
    ]


def test_arguments_processors_and_hooks_are_complete_at_construction() -> None:
    # The former translates in `__post_init__`, the latter constructs image processors.
    constructing = {PACKAGE / "train/legacy_flags.py", PACKAGE / "model/multimodal_encoder/towers.py"}
    for path in modules():
        if path not in constructing:
            assert not changed_attributes(path.read_text(encoding="utf-8")), path


def test_no_star_imports() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), f"{path}: line {node.lineno}"


def test_package_init_files_are_empty() -> None:
    listed = {PACKAGE / name / "__init__.py" for name in ("", "utils", "model/multimodal_encoder")}
    for path in PACKAGE.rglob("__init__.py"):
        assert path in listed or not path.read_text(encoding="utf-8").strip(), f"{path} is not empty"


def test_no_module_hides_an_installed_one() -> None:
    """`python llava/train/x.py` would import `llava/train/copy.py` instead of the standard library's `copy`."""
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


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function without its docstring."""
    first, lines = function.body[0], function.end_lineno or function.lineno
    is_text = ast.get_docstring(function, clean=False) is not None
    return lines - function.lineno + 1 - ((first.end_lineno or 0) - first.lineno + 1 if is_text else 0)


def test_no_function_has_more_than_50_lines_of_code() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert code_lines(node) <= 50, f"{path.relative_to(ROOT)}: {node.name} has {code_lines(node)} lines"


GENERIC_NAMES = {"read", "build", "run", "check", "load", "Options", "Source"}
"""Names that do not say what a function returns or a class holds."""


def test_no_module_exports_a_generic_name() -> None:
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                assert node.name not in GENERIC_NAMES, f"{path.relative_to(ROOT)}: {node.name}"


CONTRACTS = (
    "llava.api.LlavaPredictor",
    "llava.samples.from_row",
    "llava.processing.LlavaMedProcessor",
    "llava.data.records.load_samples",
    "llava.data.encode.encode",
    "llava.data.flat_batch.flatten",
    "llava.imaging.decode.load_image",
    "llava.model.builder.build_model",
    "llava.model.checkpoint.load.load_checkpoint",
    "llava.generation.loading.open_engine",
    "tests.support.tiny.write_tiny_lm",
    "tests.support.tiny.write_tiny_tower",
)
"""Names that other parts and scripts rely on."""


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_contract_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module_name(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}
