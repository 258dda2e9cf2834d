"""Plug-ins: one file of less than 80 lines adds parts that training, checkpoints, evaluation and data commands use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava import cli
from llava.conversation import TEMPLATES
from llava.errors import CheckpointError, ConfigError, DataError
from llava.eval import run as eval_run
from llava.generation.fingerprint import model_settings
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.tools.cli import merge_lora_weights
from llava.model.checkpoint.tools.inspection import inspect_checkpoint
from llava.processing import LlavaMedProcessor
from llava.scoring.metrics import Metric, MetricFacts
from llava.utils import plugins
from tests.support.model_tools import batch, logits
from tests.support.runs import arguments, losses, saved, write_parts

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "plugin.py"
HEAD = "from llava import plugins\n"
pytestmark = pytest.mark.usefixtures("no_plugins")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with parts, and in `run` a model with template, projector and objective of the example."""
    folder = write_parts(tmp_path_factory.mktemp("plugin"))
    words = train_words(folder, folder / "run")
    cli.run_command(["train", *words])
    plugins.unload_plugins()
    return folder


def train_words(folder: Path, output: Path, **changed: object) -> list[str]:
    chosen = {"mm_projector_type": "two-layers", "version": "clinic", "objective": "focal", "max_steps": 2}
    changed = {**chosen, "num_train_epochs": None, "plugin": EXAMPLE, **changed}
    return arguments(folder, output, **changed)


def run(*words: object) -> None:
    cli.run_command([str(word) for word in words])


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80


def test_training_uses_and_records_the_plugin(trained: Path) -> None:
    output = trained / "run"
    config = json.loads((output / "config.json").read_text())
    assert (config["projector_type"], config["template"], config["plugins"]) == ("two-layers", "clinic", ["plugin.py"])
    provenance = json.loads((output / "provenance.json").read_text())
    assert list(provenance["plugins"]) == ["plugin.py"] and len(provenance["plugins"]["plugin.py"]) == 64
    assert provenance["options"]["objective"] == "focal"
    assert str(trained) not in (output / "resolved.yaml").read_text().split("plugin:")[1]
    assert "model.multi_modal_projector.second.weight" in saved(output)
    assert len(losses(output)) == 2


def test_the_objective_of_the_plugin_is_trained(trained: Path, tmp_path: Path) -> None:
    run("train", *train_words(trained, tmp_path / "sft", objective="sft"))
    # The focal loss of a token is its loss times a factor below 1.
    assert all(focal < usual for focal, usual in zip(losses(trained / "run"), losses(tmp_path / "sft"), strict=True))


@pytest.mark.parametrize("command", [("checkpoint", "export"), ("checkpoint", "convert")])
def test_a_missing_plugin_is_one_line(trained: Path, tmp_path: Path, command: tuple[str, str]) -> None:
    with pytest.raises(CheckpointError, match=r"needs the plug-in plugin\.py; add --plugin plugin\.py") as error:
        run(*command, trained / "run", tmp_path / "out", *(["--to", "model"] if command[1] == "convert" else []))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"its template needs the plug-in plugin\.py"):
        LlavaMedProcessor.from_pretrained(trained / "run")


def test_doctor_names_a_missing_plugin(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("checkpoint", "doctor", trained / "run")
    found = capsys.readouterr().out.splitlines()
    assert [line for line in found if line.startswith("error")] == [
        "error: it needs the plug-in plugin.py; add --plugin plugin.py (a checkpoint loads no code)"
    ]
    run("checkpoint", "doctor", trained / "run", "--weights", "--plugin", EXAMPLE)
    assert capsys.readouterr().out.endswith("nothing keeps it from loading\n")


def test_doctor_knows_the_weights(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    plugins.load_plugins([str(EXAMPLE)])
    assert not inspect_checkpoint(trained / "run").counts.keys() & {"missing", "unexpected", "wrong shape"}
    broken = tmp_path / "broken"
    shutil.copytree(trained / "run", broken, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(broken / "model.safetensors")
    name = "model.multi_modal_projector.second."
    weights.pop(name + "bias")
    weights[name + "weight"] = torch.zeros(32, 31)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    rows = {row.status: row.ours for row in inspect_checkpoint(broken).rows}
    assert (rows["missing"], rows["wrong shape"]) == (name + "bias", name + "weight")


def test_export_to_transformers(trained: Path, tmp_path: Path) -> None:
    run("checkpoint", "export", trained / "run", tmp_path / "hf", "--plugin", EXAMPLE)
    ours = load_checkpoint(trained / "run", dtype=torch.float32)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert theirs.config.projector_hidden_act == "relu"
    inputs = batch(ours)
    with torch.no_grad():
        found = theirs(**inputs).logits
    torch.testing.assert_close(found, logits(ours), rtol=1e-5, atol=1e-5)
    back = load_checkpoint(tmp_path / "hf", dtype=torch.float32)
    assert back.model.config.projector_type == "two-layers"
    torch.testing.assert_close(logits(back), logits(ours), rtol=1e-5, atol=1e-5)
    plugins.unload_plugins()
    with pytest.raises(CheckpointError, match=r"needs the plug-in plugin\.py"):
        load_checkpoint(tmp_path / "hf")


def test_legacy_there_and_back(trained: Path, tmp_path: Path) -> None:
    run("checkpoint", "export", trained / "run", tmp_path / "legacy", "--to", "legacy", "--plugin", EXAMPLE)
    assert json.loads((tmp_path / "legacy" / "config.json").read_text())["llava_plugins"] == ["plugin.py"]
    run("checkpoint", "convert", tmp_path / "legacy", tmp_path / "back", "--plugin", EXAMPLE)
    here, there = saved(trained / "run"), saved(tmp_path / "back")
    names = [name for name in here if "projector" in name]
    assert len(names) == 4 and all(torch.equal(here[name], there[name]) for name in names)
    assert LlavaMedProcessor.from_pretrained(tmp_path / "back").template.name == "clinic"
    plugins.unload_plugins()
    with pytest.raises(CheckpointError, match=r"needs the plug-in plugin\.py"):
        load_checkpoint(tmp_path / "legacy")


def test_evaluation_of_the_task_with_the_metric(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "clinic").mkdir(parents=True)
    shutil.copy(trained / "vqa" / "train.json", tmp_path / "data" / "clinic" / "test.json")
    shutil.copytree(trained / "vqa" / "images", tmp_path / "data" / "clinic" / "images")
    common = ["--model", trained / "run", "--out", tmp_path / "out", "--num-resamples", "5", "--max-new-tokens", "2"]
    run("eval", "--plugin", EXAMPLE, "--tasks", "clinic", "--data-root", tmp_path / "data", *common)
    assert "brevity" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "clinic" / "results.json").read_text())
    assert 0 <= results["scores"]["strict"]["brevity"]["answered"]["value"] <= 100
    assert results["metrics"] == ["brevity", "open f1"] and list(results["provenance"]["plugins"]) == ["plugin.py"]
    assert results["provenance"]["template"] == "clinic"
    with pytest.raises(ConfigError, match=r"resolved\.yaml needs the plug-in plugin\.py"):
        run("eval", "--config", tmp_path / "out" / "clinic" / "resolved.yaml")


def test_lists_name_what_a_plugin_adds(capsys: pytest.CaptureFixture[str]) -> None:
    eval_run.main(["--tasks", "list", "--plugin", str(EXAMPLE)])
    eval_run.main(["--metrics", "list"])
    out = capsys.readouterr().out
    assert "clinic" in out and "brevity" in out and "ROUGE-L" in out


def test_the_converter_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "cases.csv"
    table.write_text("image,question,answer\na.png,What?,heart\nb.png,,none\n")
    run("data", "clinic", table, "--out", tmp_path / "rows.json", "--plugin", EXAMPLE)
    assert capsys.readouterr().out == f"2 rows -> {tmp_path / 'rows.json'}\n"
    assert json.loads((tmp_path / "rows.json").read_text())[0]["conversations"][1]["value"] == "heart"
    run("--plugin", EXAMPLE, "data", "clinic", table, "--out", tmp_path / "rows.json")
    plugins.unload_plugins()
    with pytest.raises(ConfigError, match="unknown command 'data clinic'"):
        run("data", "clinic", table, "--out", tmp_path / "rows.json")


def test_a_configuration_file_loads_no_code(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resolved\.yaml needs the plug-in plugin\.py; add --plugin plugin\.py"):
        run("train", trained / "run" / "resolved.yaml")
    text = f"plugin: [{tmp_path / 'evil.py'}]\n"
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for words in (["train"], ["eval", "--config"]):
        with pytest.raises(ConfigError, match=r"needs the plug-in evil\.py"):
            run(*words, tmp_path / "run.yaml")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_loads_no_code(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained / "run", copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.copy(EXAMPLE, copy / "plugin.py")
    with pytest.raises(CheckpointError, match=r"needs the plug-in plugin\.py"):
        load_checkpoint(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "plugins": {"a": 1}}))
    with pytest.raises((CheckpointError, ConfigError)) as error:  # a damaged record names none; the type is unknown
        load_checkpoint(copy)
    assert "\n" not in str(error.value)


def test_a_changed_plugin_is_not_resumed(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    own = tmp_path / "plugin.py"
    own.write_text(EXAMPLE.read_text())
    words = {"save_strategy": "steps", "save_steps": 1, "plugin": own}
    run("train", *train_words(trained, output, **words, max_steps=1))
    plugins.unload_plugins()
    own.write_text(EXAMPLE.read_text() + "\n")
    with pytest.raises(ConfigError, match="cannot be resumed: its run had plugins"):
        run("train", *train_words(trained, output, **words, max_steps=2))


def test_a_failing_metric_or_converter_is_one_line(tmp_path: Path) -> None:
    def fails(items: Any) -> list[float]:
        raise KeyError("x")

    items: Any = [SimpleNamespace(reference="a", prediction="b")]
    for values, message in (
        (fails, "metric 'm' failed: KeyError: 'x'"),
        (lambda items: [2.0], r"metric 'm' returned 2\.0 for question 0; its scale is 0-1"),
        (lambda items: [], "metric 'm' returned 0 values for 1 questions"),
        (lambda items: ["a"], "metric 'm' failed: ValueError"),
    ):
        with pytest.raises(ConfigError, match=message):
            Metric("m", values, MetricFacts(version="1")).shares(items)
    (tmp_path / "own.py").write_text(
        HEAD + "plugins.add_converter('broken', lambda path: 1 / 0)\n"
        "plugins.add_converter('bad-rows', lambda path: [{'id': 'a'}])\n"
        "plugins.add_converter('no-rows', lambda path: [])\n"
    )
    for name, message in (
        ("broken", "converter broken failed: ZeroDivisionError"),
        ("bad-rows", "converter bad-rows, row 0: field 'conversations' is missing"),
        ("no-rows", "converter no-rows: the source gave no rows"),
    ):
        with pytest.raises(DataError, match=message) as error:
            run("data", name, tmp_path, "--out", tmp_path / "rows.json", "--plugin", tmp_path / "own.py")
        assert "\n" not in str(error.value) and not (tmp_path / "rows.json").exists()


def test_two_stages_and_a_merge(trained: Path, tmp_path: Path) -> None:
    common = {"objective": None, "max_steps": 1}
    run("train", *train_words(trained, tmp_path / "align", **common, tune_mm_mlp_adapter=True))
    on_align = {"pretrain_mm_mlp_adapter": tmp_path / "align" / "mm_projector.bin", "lora_enable": True, "lora_r": 2}
    run("train", *train_words(trained, tmp_path / "lora", **common, **on_align))
    plugins.unload_plugins()
    with pytest.raises(CheckpointError, match=r"needs the plug-in plugin\.py"):
        load_checkpoint(tmp_path / "lora")
    words = ["--model-path", tmp_path / "lora", "--save-model-path", tmp_path / "merged", "--plugin", EXAMPLE]
    merge_lora_weights([str(word) for word in words])
    merged = load_checkpoint(tmp_path / "merged", dtype=torch.float32)
    adapted = load_checkpoint(tmp_path / "lora", dtype=torch.float32)
    assert merged.model.config.plugins == ["plugin.py"]
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-5)


def test_continuing_without_the_plugin_is_one_line(trained: Path, tmp_path: Path) -> None:
    words = arguments(trained, tmp_path / "out", model_name_or_path=trained / "run", vision_tower=None)
    with pytest.raises(CheckpointError, match=r"it needs the plug-in plugin\.py") as error:
        run("train", *words)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"its template needs the plug-in plugin\.py"):
        run("data", "show", trained / "vqa" / "train.json", "--model", trained / "run")


def test_answers_of_another_version_of_a_template_are_not_kept(trained: Path, tmp_path: Path) -> None:
    def settings(source: str) -> dict[str, Any]:
        plugins.unload_plugins()
        (tmp_path / "plugin.py").write_text(source)
        words = ["--model", trained / "run", "--data", "x", "--image-folder", "x", "--out", "x"]
        args = eval_run.make_parser().parse_args([*map(str, words), "--plugin", str(tmp_path / "plugin.py")])
        return model_settings(args)

    first, second = settings(EXAMPLE.read_text()), settings(EXAMPLE.read_text() + "# other\n")
    assert first.pop("plugins") != second.pop("plugins") and first == second
    # One that adds something else changes no answer.
    (tmp_path / "metric.py").write_text(HEAD)
    plugins.load_plugins([str(tmp_path / "metric.py")])
    assert list(settings(EXAMPLE.read_text())["plugins"]) == ["plugin.py"]


def test_the_worker_of_a_server_gets_the_plugin() -> None:
    from llava.serve import run as serve
    from llava.serve.model_worker import add_model_options

    args = serve.make_parser().parse_args(["--model-path", "m", "--plugin", str(EXAMPLE)])
    assert f"--plugin={EXAMPLE}" in serve.words_of(add_model_options, args)
    assert "clinic" in TEMPLATES
