"""Every recipe of `examples/` runs with tiny parts, and does what it alone shows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava.processing import LlavaMedProcessor
from llava.train import command
from llava.train.option_table import read_table
from tests.support.fast_python import without_build
from tests.support.pairs import write_pairs
from tests.support.ranks import run_ranks
from tests.support.rollouts import write_toy
from tests.support.runs import kept_trainer, saved
from tests.support.tiny import write_tiny_lm, write_tiny_tower, write_tiny_vqa

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path.stem for path in EXAMPLES.glob("*.yaml") if not path.stem.endswith("_sources"))
DIALOGUE = [
    {"from": speaker, "value": f"{text} {number}"}
    for number in range(3)
    for speaker, text in (("human", "And this one?"), ("gpt", "Yes."))
]
"""Turns that follow those of a row."""

LAUNCHED = {"deepspeed_zero2": 4, "deepspeed_zero3": 8, "fsdp2": 8}
"""Recipes of several processes, and their number."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts, rows, pairs, sources, a checkpoint and a projector."""
    folder = tmp_path_factory.mktemp("parts")
    write_tiny_lm(folder / "lm", hidden_size=64, intermediate_size=128)
    write_tiny_tower(folder / "tower")
    write_tiny_vqa(folder / "vqa")
    write_pairs(folder / "pairs")
    write_toy(folder / "toy")
    rows = json.loads((folder / "vqa" / "train.json").read_text())
    (folder / "vqa" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dialogues = [{**row, "conversations": row["conversations"] + DIALOGUE} for row in rows]
    (folder / "vqa" / "dialogues.json").write_text(json.dumps(dialogues))
    source = "{{name: {}, path: vqa/{}, images: vqa/images, weight: {}}}"
    two = f"sources: [{source.format('a', 'train.json', 2)}, {source.format('b', 'rows.jsonl', 1)}]\n"
    (folder / "mixture.yaml").write_text(two)
    (folder / "stream.yaml").write_text(f"stream: true\nsources: [{source.format('a', 'rows.jsonl', 1)}]\n")
    new = ["--model-name-or-path", str(folder / "lm"), "--vision-tower", str(folder / "tower")]
    command.main([*new, *words_for("instruct", folder), "--output-dir", str(folder / "base"), "--version", "v1"])
    command.main([*new, *words_for("alignment", folder), "--output-dir", str(folder / "aligned"),
                  "--tune-mm-mlp-adapter", "True"])  # fmt: skip
    return folder


def words_for(name: str, folder: Path) -> list[str]:
    """Return the words that replace the data, the length and the precision of a recipe."""
    sources = {"mixture": folder / "mixture.yaml", "stream": folder / "stream.yaml"}
    named = {"dpo": folder / "pairs" / "pairs.json", "self_questioning": folder / "vqa" / "dialogues.json"}
    if name == "grpo":
        toy = folder / "toy"
        return ["--data-path", str(toy / "table.json"), "--image-folder", str(toy / "images"),
                "--rules", str(toy / "rules.yaml"), "--rollout-batch-size", "8", "--num-generations", "4",
                "--response-len", "3", "--bf16", "False", "--max-steps", "2", "--report-to", "none"]  # fmt: skip
    rows = named.get(name, folder / "vqa" / "train.json")
    images = folder / ("pairs" if name == "dpo" else "vqa") / "images"
    words = ["--data-path", str(sources.get(name, rows)), "--bf16", "False", "--max-steps", "2",
             "--report-to", "none", "--per-device-train-batch-size", "4", "--save-strategy", "no",
             "--dataloader-num-workers", "0"]  # fmt: skip
    return words if name in sources else [*words, "--image-folder", str(images)]


def run(name: str, parts: Path, output: Path) -> Path:
    """Run a recipe with tiny parts; return its folder."""
    options = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    words = [str(EXAMPLES / f"{name}.yaml"), *words_for(name, parts), "--output-dir", str(output)]
    new = "vision_tower" in options
    words += ["--model-name-or-path", str(parts / ("lm" if new else "base"))]
    words += ["--vision-tower", str(parts / "tower")] if new else []
    words += ["--pretrain-mm-mlp-adapter", str(parts / "aligned")] if "pretrain_mm_mlp_adapter" in options else []
    if "eval_data_path" in options:
        words += ["--eval-data-path", str(parts / "vqa" / "train.json"), "--max-steps=-1", "--num-train-epochs", "1",
                  "--save-strategy", "epoch"]  # fmt: skip
    if "save_steps" in options:
        words += ["--save-strategy", "no"]
    command.main(words)
    return output


def names_of(folder: Path) -> set[str]:
    return set(saved(folder))


def adapter_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def resolved(folder: Path, group: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "resolved_arguments.json").read_text())[group]
    return found


def only_the_projector(folder: Path) -> None:
    assert (folder / "mm_projector.safetensors").is_file() and not (folder / "model.safetensors").exists()
    assert LlavaMedProcessor.from_pretrained(folder).template.name == "plain"


def whole_model(folder: Path) -> None:
    table = (folder / "trainable_parameters.txt").read_text()
    rows = {line[:16].strip(): line.split()[-1] for line in table.splitlines()[1:]}
    assert rows["language model"] == "100.00%" and rows["vision tower"] == "0.00%"


def best_is_kept(folder: Path) -> None:
    assert resolved(folder, "training")["load_best_model_at_end"] is True
    assert any("eval_loss" in line for line in (folder / "metrics.jsonl").read_text().splitlines())


def chosen_layers(folder: Path) -> None:
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in names_of(folder) if ".lora_A" in name}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj"} and adapter_of(folder)["use_rslora"] is True


def magnitudes_and_head(folder: Path) -> None:
    names = names_of(folder)
    assert adapter_of(folder)["use_dora"] is True and any("lora_magnitude_vector" in name for name in names)
    assert any("lm_head" in name for name in names) and adapter_of(folder)["modules_to_save"] == ["lm_head"]


def four_bits(folder: Path) -> None:
    assert json.loads((folder / "llava_origin.json").read_text())["build"]["bits"] == 4


def tower_adapter(folder: Path) -> None:
    assert any("vision_tower" in name and ".lora_A" in name for name in names_of(folder))


def asks(folder: Path) -> None:
    processor = LlavaMedProcessor.from_pretrained(folder)
    assert processor.template.name == "chatml_sq" and processor.template.asked_header() is not None
    assert any("question_loss" in line for line in (folder / "metrics.jsonl").read_text().splitlines())


def pairs_are_trained(folder: Path) -> None:
    assert resolved(folder, "preference")["objective"] == "dpo"
    assert any("reward" in line or "margin" in line for line in (folder / "metrics.jsonl").read_text().splitlines())


def dialogues_are_rewarded(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and {row["group"] for row in rows} == {0, 1}
    assert all("reward" in json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:2])
    assert any(".lora_A" in name for name in names_of(folder))


def order_holds(word: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        assert word in json.loads((folder / "provenance.json").read_text())["order"]

    return check


def tiles(folder: Path) -> None:
    assert LlavaMedProcessor.from_pretrained(folder).image_mode == "anyres"


def large_adapter(folder: Path) -> None:
    assert adapter_of(folder)["r"] == 128 and resolved(folder, "model")["version"] == "v1"


SHOWN: dict[str, Callable[[Path], None]] = {
    "alignment": only_the_projector,
    "anyres": tiles,
    "dora": magnitudes_and_head,
    "dpo": pairs_are_trained,
    "grpo": dialogues_are_rewarded,
    "instruct": whole_model,
    "lora": chosen_layers,
    "mixture": order_holds("drawn with weights 2, 1"),
    "qlora": four_bits,
    "rad_findings": large_adapter,
    "self_questioning": asks,
    "stream": order_holds("stream of 1 sources"),
    "vit_lora": tower_adapter,
    "vqa": best_is_kept,
}


def test_every_recipe_is_tested_and_listed() -> None:
    assert set(RECIPES) == SHOWN.keys() | LAUNCHED.keys() and len(RECIPES) >= 12
    table = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}.yaml`" in table for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_of_a_recipe_exists(name: str) -> None:
    known = {row.name.removeprefix("--").replace("-", "_") for row in read_table()}
    assert yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()).keys() <= known


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_a_recipe_runs(name: str, parts: Path, tmp_path: Path) -> None:
    if name == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    SHOWN[name](run(name, parts, tmp_path / "run"))


def words_of_rank(name: str, parts: Path, output: Path) -> list[str]:
    """Return the command line of torchrun for a recipe with tiny parts."""
    replaced = ["--model-name-or-path", str(parts / "lm"), "--vision-tower", str(parts / "tower")]
    replaced += ["--output-dir", str(output), "--version", "v1"]
    words, options = command.checked_words([str(EXAMPLES / f"{name}.yaml"), *words_for(name, parts), *replaced])
    return command.torchrun_command(words, options)


def train_as_rank(words: list[str]) -> tuple[str, int, bool]:
    """Job: train; return what wrapped the model, its ZeRO stage (0: none), and whether weights were divided."""
    without_build()
    os.chdir(ROOT)  # where recipes name `scripts/zero2.json`
    wrapped = kept_trainer(partial(command.main, words)).model_wrapped
    stage = wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else 0
    return type(wrapped).__name__, stage, all(hasattr(weight, "ds_tensor") for weight in wrapped.parameters())


WRAPPED = {
    "deepspeed_zero2": ("DeepSpeedEngine", 2, False),
    "deepspeed_zero3": ("DeepSpeedEngine", 3, True),
    "fsdp2": ("DistributedDataParallel", 0, False),  # without GPUs; FSDP2 by hand: tests/distributed/test_sharded.py
}
"""What each recipe of several processes alone shows on a CPU: engine, ZeRO stage, divided weights."""


@pytest.mark.parametrize("name", sorted(LAUNCHED))
def test_a_recipe_of_several_processes_runs_on_two(
    name: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = words_of_rank(name, parts, tmp_path / "run")
    assert run_ranks(2, train_as_rank, words[words.index("train") + 1 :]) == [WRAPPED[name]] * 2
    whole_model(tmp_path / "run")
    assert len(saved(tmp_path / "run")) > 20


@pytest.mark.parametrize("name", sorted(LAUNCHED))
def test_a_recipe_of_several_processes_starts_torchrun(
    name: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(ROOT)
    started = words_of_rank(name, parts, tmp_path)
    assert f"--nproc_per_node={LAUNCHED[name]}" in started
    assert not any(word.startswith("--nproc=") for word in started[started.index("train") :])
