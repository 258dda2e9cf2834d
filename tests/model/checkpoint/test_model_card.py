"""The model card of saved weights: parts, licenses, data hashes; and a card of the user's own."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava.eval import run as eval_run
from llava.model.builder import LoadedModel
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.model_card import MARK, NOT_STATED, license_of, model_parts, public_name
from llava.model.checkpoint.model_cells import code_cell
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.checkpoint.tools.merge_lora import merge_lora
from llava.model.checkpoint.training_runs import inherited_runs, public_command
from llava.model.lora import add_lora
from tests.support.runs import arguments, train, write_parts
from tests.support.tiny import tiny_image


def test_parts_and_their_licenses(tmp_path: Path, built: LoadedModel) -> None:
    folder = tmp_path / "parts"
    (folder / "lm" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "tower" / "LICENSE").write_text("MIT License\n\nCopyright\n")
    save_model(built.model, built.processor, tmp_path / "model", origin=built.origin)
    text = (tmp_path / "model" / "README.md").read_text()
    assert "language model: `lm`; license: apache-2.0" in text
    assert "vision tower: `tower`; license: LICENSE in its folder (MIT License)" in text
    assert text.startswith("---\n")
    assert "No training run wrote this folder." in text
    save_model(built.model, built.processor, tmp_path / "second", origin={"base": str(tmp_path / "model")})
    second = (tmp_path / "second" / "README.md").read_text()
    assert "base: `model`" in second
    assert str(tmp_path) not in text + second
    assert "license: apache-2.0" in second


def test_data_hashes_of_the_run_and_of_its_checkpoints(tmp_path: Path, built: LoadedModel) -> None:
    run = tmp_path / "run"
    run.mkdir()
    facts = {"data_path": "x/train.json", "data_sha256": "d" * 64, "model_sha256": "m" * 64, "seed": 7, "command": "go"}
    (run / "provenance.json").write_text(json.dumps(facts))
    save_projector(built.model, built.processor, run, origin=built.origin)
    save_projector(built.model, built.processor, run / "checkpoint-5", origin=built.origin)
    for folder in (run, run / "checkpoint-5"):
        text = (folder / "README.md").read_text()
        assert f"training data `train.json`: sha256 `{'d' * 64}`" in text
        assert f"weights at the start: sha256 `{'m' * 64}`" in text
        assert "seed 7" in text


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python train.py --data_path /hospital/ward 3/train.json", None),
        ("llava train --data /srv/clinic/a.json --lm lmsys/vicuna", "llava train --data a.json --lm lmsys/vicuna"),
        ("llava train --data=/srv/a.json,/srv/b.json", "llava train --data=a.json,b.json"),
        ("llava train '/My Hospital/x y.json' ~/runs", "llava train 'x y.json' runs"),
        ("llava train --data file:///srv/clinic/a.json", "llava train --data file://a.json"),
        ("llava train --base http://localhost:8000/v1 runs/first", None),
        ('train \'{"a": "/srv/clinic/a.json"}\'', 'train \'{"a": "a.json"}\''),
    ],
)
def test_paths_of_the_machine_are_not_in_the_command(command: str, expected: str | None) -> None:
    found = public_command(command)
    assert expected is None or found == expected
    assert not any(word in found for word in ("hospital", "srv", "clinic", "My Hospital", "~"))
    assert "http" not in command or found == command


def test_names_of_parts() -> None:
    names = {"lmsys/vicuna-7b-v1.5": "lmsys/vicuna-7b-v1.5", "/srv/clinic/lm": "lm", "~/lm": "lm", "../a/lm": "lm"}
    assert {name: public_name(name) for name in names} == names


def test_bases_that_name_each_other(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        (tmp_path / one / "llava_origin.json").write_text(json.dumps({"base": str(tmp_path / other)}))
    found = [part.name for part in model_parts({"base": str(tmp_path / "a")})]
    assert found == ["a", "b", "a"]


def test_a_card_of_the_users_own_is_kept(tmp_path: Path, built: LoadedModel) -> None:
    network = add_lora(built, r=2)
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    card = tmp_path / "adapter" / "README.md"
    assert "a LoRA adapter" in card.read_text()
    card.write_text(card.read_text().replace(MARK + "\n", "") + "My own words.\n")
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    assert card.read_text().endswith("My own words.\n")


def test_licenses_that_are_not_stated(tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) == NOT_STATED
    assert license_of("somebody/unknown") == NOT_STATED
    assert license_of("lmsys/vicuna-7b-v1.5") == "Llama 2 Community License"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `first`, a trained model with an evaluation, and `second`, an adapter trained on it."""
    folder = write_parts(tmp_path_factory.mktemp("card"))
    train(arguments(folder, folder / "first", version="vicuna_v1", max_steps=1, num_train_epochs=None))
    options = ["--data", folder / "vqa" / "train.json", "--image-folder", folder / "vqa" / "images"]
    words = ["--model", folder / "first", *options, "--out", folder / "first" / "eval", "--limit", 4]
    eval_run.main(list(map(str, [*words, "--num-resamples", 5, "--max-new-tokens", 2])))
    lora = {"lora_enable": True, "lora_r": 2, "seed": 7, "version": None, "vision_tower": None}
    on_first = {"model_name_or_path": folder / "first", "max_steps": 1, "num_train_epochs": None}
    train(arguments(folder, folder / "second", **on_first, **lora))
    return folder


def data_hash(folder: Path) -> str:
    return str(json.loads((folder / "provenance.json").read_text())["data_sha256"])


@pytest.mark.parametrize("to", ["hf", "legacy", "model"])
def test_an_export_keeps_training_and_scores(run: Path, tmp_path: Path, to: str) -> None:
    convert_checkpoint(run / "first", tmp_path / to, to)
    text = (tmp_path / to / "README.md").read_text()
    assert f"training data `train.json`: sha256 `{data_hash(run / 'first')}`" in text
    assert "objective sft" in text and "- command: `" in text and "## Citation" in text
    assert "first 4 rows, template vicuna_v1, greedy, at most 2 tokens, metrics" in text
    assert "| closed accuracy | 2 |" in text and str(run) not in text
    # A second export has neither the run nor the folder of its base.
    (moved := tmp_path / "moved").mkdir()
    shutil.copytree(tmp_path / to, moved / to)
    shutil.rmtree(tmp_path / to)
    convert_checkpoint(moved / to, tmp_path / "again", "hf" if to != "hf" else "model")
    second = (tmp_path / "again" / "README.md").read_text()
    assert f"sha256 `{data_hash(run / 'first')}`" in second and "| closed accuracy | 2 |" in second


def test_a_merge_names_both_runs(run: Path, tmp_path: Path) -> None:
    merge_lora(run / "second", None, tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert text.index("### first") < text.index("### second") < text.index("seed 7")
    assert "## Scores" not in text  # those of `first` are not those of the merged weights
    card = (run / "second" / "README.md").read_text()
    assert "### first" in card and "### second" in card and "base: `first`" in card


def test_scores_of_other_weights_are_left_out(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "first", tmp_path / "first")
    results = tmp_path / "first" / "eval" / "results.json"
    report = json.loads(results.read_text())
    report["provenance"]["weights"] = "0" * 64
    results.write_text(json.dumps(report))
    convert_checkpoint(tmp_path / "first", tmp_path / "out", "model")
    assert "## Scores" not in (tmp_path / "out" / "README.md").read_text()


def test_a_broken_record_of_the_base_does_not_stop_an_export(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "first", tmp_path / "first")
    (tmp_path / "first" / "provenance.json").write_text("{")
    convert_checkpoint(tmp_path / "first", tmp_path / "out", "model")
    assert "No training run wrote this folder." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["first", "second", "hf"])
def test_the_code_of_a_card_runs(
    run: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / kind
    if kind == "hf":
        convert_checkpoint(run / "first", tmp_path / "hf", "hf")
        folder = tmp_path / "hf"
    monkeypatch.chdir(folder.parent)
    tiny_image(0).save("xray.png")
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_a_plugin_is_named_in_the_code() -> None:
    lines = code_cell("first", "model", SimpleNamespace(plugins=["own.py"]))
    code = "\n".join(lines[1:-1])
    assert "load_plugins(['own.py'])" in code and "It needs the plug-in own.py" in code
    compile(code, "card", "exec")


def test_hub_names_of_cached_folders() -> None:
    cached = "/home/a/.cache/huggingface/hub/models--lmsys--vicuna-7b-v1.5/snapshots/3321f76e3f5"
    assert public_name(cached) == "lmsys/vicuna-7b-v1.5"
    assert license_of(cached) == "Llama 2 Community License"


def test_only_hub_names_are_in_the_header(run: Path) -> None:
    header = (run / "first" / "README.md").read_text().split("---")[1]
    assert "base_model" not in header  # a folder's name is not a name of the hub


@pytest.mark.parametrize("to", ["hf", "legacy", "model"])
def test_file_modes_follow_the_umask(run: Path, tmp_path: Path, to: str) -> None:
    before = os.umask(0o027)
    try:
        convert_checkpoint(run / "first", tmp_path / to, to)
        save_model(**vars_of(run / "first"), path=tmp_path / "saved")
    finally:
        os.umask(before)
    for folder in (tmp_path / to, tmp_path / "saved"):
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in folder.rglob("*") if file.is_file()}
        assert modes and set(modes.values()) == {"0o640"}, modes


def vars_of(folder: Path) -> dict[str, Any]:
    loaded = load_checkpoint(folder)
    return {"model": loaded.model, "processor": loaded.processor}


def test_modes_of_a_trained_folder(run: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    wanted = 0o666 & ~umask
    files = [file for file in (run / "first").rglob("*") if file.is_file()]
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {file.name: oct(wanted) for file in files}


HOSTILE = {
    "runs": [
        7,
        {"name": "a\n# b<script>", "command": "x`\n- y", "data": [3, {"role": "<img>", "name": "n`", "sha256": 4}]},
        {"plugins": ["a"], "seed": {"a": "\n"}},
        {"data": "text", "scores": [1, {"rows": [["<b>|x", 1, 2, 3, "4", None], ["short"], "text"]}, {"rows": 5}]},
    ]
}


def test_records_of_strangers_do_not_break_a_card(run: Path, tmp_path: Path) -> None:
    convert_checkpoint(run / "first", tmp_path / "stranger", "model")
    (tmp_path / "stranger" / "training_runs.json").write_text(json.dumps(HOSTILE))
    (tmp_path / "stranger" / "eval").mkdir()
    (tmp_path / "stranger" / "eval" / "results.json").write_text('{"provenance": {"weights": 1}, "scores": []}')
    convert_checkpoint(tmp_path / "stranger", tmp_path / "out", "model")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "### a # b&lt;script>" in text and "- command: `x' - y`" in text and "<img>" not in text
    assert "| &lt;b>&#124;x | 1 | 2.00 | 3.00 to - | - |" in text
    stored = json.loads((tmp_path / "out" / "training_runs.json").read_text())["runs"]
    assert len(stored) == 3
    (tmp_path / "stranger" / "training_runs.json").write_text(json.dumps(HOSTILE) + " " * (1 << 20))
    assert "script" not in json.dumps(inherited_runs({"base": str(tmp_path / "stranger")}))


def test_checkpoints_of_a_run_do_not_hash_their_base(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr("llava.model.checkpoint.training_runs.weights_sha256", hashed)
    loaded = load_checkpoint(run / "first")
    save_model(loaded.model, loaded.processor, run / "second" / "checkpoint-9", origin=loaded.origin)
    shutil.rmtree(run / "second" / "checkpoint-9")
