"""Every command opens a checkpoint once and passes it on; what it builds on, too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava import api, cli
from llava.generation.loading import open_engine
from llava.model.builder import LoadedModel
from llava.model.checkpoint import formats
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load import load_checkpoint, open_checkpoint
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.lora import add_lora, freeze_for
from llava.serve import model_worker
from llava.serve.worker_run import _server_engine
from llava.train.model import open_model
from llava.train.parsing import parse_training_args
from tests.support.legacy_folders import write_legacy, write_lora, write_projector_only
from tests.support.rollouts import rl_arguments, rl_train, write_toy
from tests.support.runs import arguments, train
from tests.support.tiny import tiny_image, write_tiny_vqa


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of every kind, and `base of` what needs one."""
    root = tmp_path_factory.mktemp("kinds")
    names = ("whole", "lora", "tower", "stage1")
    legacy, lora, both, stage1 = (root / name for name in names)
    for folder in (legacy, lora, both, stage1):
        folder.mkdir()
    found = {
        "legacy": write_legacy(legacy),
        "legacy adapter": write_lora(lora),
        "legacy adapter with a tower's": write_lora(both, tower_adapter=True),
        "legacy projector": write_projector_only(stage1),
    }
    loaded = load_checkpoint(found["legacy"])
    save_model(loaded.model, loaded.processor, root / "model", origin=loaded.origin)
    save_projector(loaded.model, loaded.processor, root / "projector", origin={"base": str(root / "model")})
    network: Any = add_lora(loaded, r=2)
    freeze_for(network, has_adapter=True)
    save_adapter(network, loaded.processor, root / "adapter", origin={"base": str(root / "model")})
    save_adapter(network, loaded.processor, root / "second", origin={"base": str(root / "adapter")})
    cli.main(["checkpoint", "export", str(root / "adapter"), str(root / "peft"), "--to", "peft"])
    found |= {name: root / name for name in ("model", "projector", "adapter")}
    return found | {
        "adapter of an adapter": root / "second",
        "transformers' Llava": root / "peft" / "base",
        "its adapter": root / "peft" / "adapter",
    }


def base_of(name: str, folder: Path) -> list[str]:
    return ["--model-base", str(folder.parent / "lm")] if name.startswith("legacy ") else []


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Count how often each path is opened, and how often the headers of each are listed."""
    counts: Counter[Path] = Counter()
    real_open, real_list = Checkpoint.open, formats.list_tensors

    def counted(cls: type[Checkpoint], path: str | Path) -> Checkpoint:
        counts[Path(path).resolve()] += 1
        return real_open(path)

    def listed(path: str | Path) -> Any:
        counts[Path(path).resolve() / "headers"] += 1
        return real_list(path)

    monkeypatch.setattr(Checkpoint, "open", classmethod(counted))
    monkeypatch.setattr(formats, "list_tensors", listed)
    return counts


KINDS = [
    *("legacy", "legacy adapter", "legacy adapter with a tower's", "legacy projector", "model", "projector"),
    *("adapter", "adapter of an adapter", "transformers' Llava", "its adapter"),
]


def check(opened: Counter[Path], folder: Path) -> None:
    assert opened[folder.resolve()] == 1
    assert not {path: count for path, count in opened.items() if count > 1}


@pytest.mark.parametrize("name", KINDS)
def test_convert(folders: dict[str, Path], opened: Counter[Path], tmp_path: Path, name: str) -> None:
    folder = folders[name]
    cli.main(["checkpoint", "convert", str(folder), str(tmp_path / "out"), "--to", "model", *base_of(name, folder)])
    check(opened, folder)


OTHER_WRITES = [
    *(("legacy", "ours"), ("legacy", "legacy"), ("legacy", "hf"), ("legacy adapter", "ours"), ("model", "legacy")),
    *(("legacy adapter with a tower's", "ours"), ("legacy adapter", "peft"), ("legacy projector", "ours")),
    *(("adapter", "peft"), ("adapter", "legacy"), ("projector", "legacy"), ("its adapter", "ours")),
]


@pytest.mark.parametrize(("name", "to"), OTHER_WRITES)
def test_convert_to_other_formats(
    folders: dict[str, Path], opened: Counter[Path], tmp_path: Path, name: str, to: str
) -> None:
    folder = folders[name]
    cli.main(["checkpoint", "convert", str(folder), str(tmp_path / "out"), "--to", to, *base_of(name, folder)])
    check(opened, folder)


@pytest.mark.parametrize("name", ["legacy adapter", "legacy adapter with a tower's", "legacy projector", "adapter"])
def test_merge(folders: dict[str, Path], opened: Counter[Path], tmp_path: Path, name: str) -> None:
    from llava.model.checkpoint.tools.cli import merge_lora_weights

    folder = folders[name]
    words = ["--model-path", str(folder), "--save-model-path", str(tmp_path / "out"), *base_of(name, folder)]
    merge_lora_weights(words)
    check(opened, folder)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_reports(folders: dict[str, Path], opened: Counter[Path], command: str, name: str) -> None:
    cli.main(["checkpoint", command, str(folders[name])])
    check(opened, folders[name])


def test_diff(folders: dict[str, Path], opened: Counter[Path]) -> None:
    with pytest.raises(SystemExit):
        cli.main(
            ["checkpoint", "diff", str(folders["legacy adapter with a tower's"]), str(folders["legacy projector"])]
        )
    check(opened, folders["legacy projector"])
    check(opened, folders["legacy adapter with a tower's"])


@pytest.mark.parametrize("name", KINDS)
def test_an_engine(folders: dict[str, Path], opened: Counter[Path], name: str) -> None:
    folder = folders[name]
    base = str(folder.parent / "lm") if name.startswith("legacy ") else None
    open_engine(str(folder), base=base, device="cpu")
    check(opened, folder)


@pytest.mark.parametrize("name", ["legacy", "model", "adapter of an adapter", "transformers' Llava", "its adapter"])
def test_training(folders: dict[str, Path], opened: Counter[Path], tmp_path: Path, name: str) -> None:
    words = ["--model_name_or_path", str(folders[name]), "--data_path", "x.json", "--output_dir", str(tmp_path / "run")]
    words += ["--report_to", "none", "--bf16", "False", "--use_cpu", "True"]
    if name in ("legacy", "transformers' Llava"):
        words += ["--vision_tower", str(folders["legacy"].parent / "tower")]
    open_model(parse_training_args(words).model_spec())
    check(opened, folders[name])


def test_an_evaluation(folders: dict[str, Path], opened: Counter[Path], tmp_path: Path) -> None:
    data = write_tiny_vqa(tmp_path / "vqa", num_images=1, questions_per_image=2)
    words = ["eval", "--model", str(folders["adapter"]), "--data", str(data / "train.json"), "--device", "cpu"]
    words += ["--image-folder", str(data / "images"), "--out", str(tmp_path / "eval"), "--max-new-tokens", "2"]
    cli.main([*words, "--num-resamples", "10"])
    check(opened, folders["adapter"])


def asked_commands(folder: Path, work: Path) -> dict[str, list[str]]:
    """Return the commands that answer with a model, by name."""
    tiny_image(1).save(work / "a.png")
    (work / "questions.jsonl").write_text(json.dumps({"image": "a.png", "prompt": ["What is it?"]}) + "\n")
    model = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "2"]
    out = ["--out", str(work / "out.jsonl")]
    return {
        "chat": ["chat", *model, "--image", str(work / "a.png"), "--question", "What is it?"],
        "findings": ["findings", str(work / "a.png"), *model],
        "ask": ["ask", *model, "--images", str(work), "--conv-mode", "v1_sq", "--n-shot", "1", *out],
        "preferences answer": [
            *("preferences", "answer", str(work / "questions.jsonl"), *model),
            *("--image-folder", str(work), "--n", "2", *out),
        ],
    }


@pytest.mark.parametrize("command", ["chat", "findings", "ask", "preferences answer"])
@pytest.mark.parametrize("name", ["model", "adapter of an adapter"])
def test_commands_that_answer(
    folders: dict[str, Path], opened: Counter[Path], tmp_path: Path, name: str, command: str
) -> None:
    cli.main(asked_commands(folders[name], tmp_path)[command])
    check(opened, folders[name])


def test_a_worker(folders: dict[str, Path], opened: Counter[Path]) -> None:
    words = ["--model-path", str(folders["adapter"]), "--device", "cpu", "--no-register"]
    _server_engine(model_worker.make_parser().parse_args(words))
    check(opened, folders["adapter"])


@pytest.fixture
def started(folders: dict[str, Path], parts: Path, tmp_path: Path) -> list[str]:
    """Return the command line of a run that starts from a whole model and saves a checkpoint at every step."""
    changed = {"model_name_or_path": folders["model"], "vision_tower": None, "max_steps": 1, "save_strategy": "steps"}
    return arguments(parts, tmp_path / "run", save_steps=1, **changed)


def test_a_whole_training(folders: dict[str, Path], opened: Counter[Path], started: list[str]) -> None:
    train(started)
    check(opened, folders["model"])


def test_a_resumed_training(folders: dict[str, Path], opened: Counter[Path], started: list[str]) -> None:
    train(started)
    opened.clear()
    train([*started, "--max_steps", "2"])
    check(opened, folders["model"])


def test_log_probabilities_of_preferences(folders: dict[str, Path], opened: Counter[Path], tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "a"}]
    pair = {"id": "1", "chosen_conversations": turns, "reject_conversations": [turns[0], {"from": "gpt", "value": "b"}]}
    (tmp_path / "pairs.json").write_text(json.dumps([pair]))
    words = ["--model-name-or-path", str(folders["model"]), "--data-path", str(tmp_path / "pairs.json")]
    words += ["--bf16", "False", "--use-cpu", "True", "--out", str(tmp_path / "scores.jsonl")]
    cli.main(["preferences", "score", *words])
    check(opened, folders["model"])


def test_reinforcement_learning(folders: dict[str, Path], opened: Counter[Path], tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    toy = write_toy(tmp_path / "toy")
    rl_train(rl_arguments(toy, tmp_path / "run", model_name_or_path=folders["model"], vision_tower=None, max_steps=1))
    check(opened, folders["model"])


LOADERS: dict[str, Callable[[Any], LoadedModel | Any]] = {
    "load_checkpoint": load_checkpoint,
    "open_engine": lambda checkpoint: open_engine(checkpoint, device="cpu"),
    "load_predictor": lambda checkpoint: api.load_predictor(checkpoint, device="cpu"),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_open_already_is_not_opened_again(folders: dict[str, Path], opened: Counter[Path], loader: str) -> None:
    checkpoint = open_checkpoint(folders["model"])
    LOADERS[loader](checkpoint)
    assert opened[folders["model"].resolve()] == 1
