"""Sizes of a configuration: what no model can have ends in one line that names the key, before memory follows it."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from llava.cli import main
from llava.errors import CheckpointError, LlavaError
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model
from llava.model.config_sizes import check_patterns, check_sizes
from llava.model.language_models import language_config
from llava.model.multimodal_encoder.towers import load_tower
from tests.support.legacy_folders import write_legacy
from tests.support.runs import arguments, train, write_parts
from tests.support.tiny import tiny_llava, write_tiny_lm, write_tiny_tower, write_tiny_vqa

BAD: list[Any] = [10**9, 10**18, -1, 1.5, True, "32", float("nan"), float("inf"), [[32]]]
KEYS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"]
TOWER_KEYS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "num_channels"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    loaded = tiny_llava(projector_type="mlp2x_gelu")
    save_model(loaded.model, loaded.processor, root / "ours")
    export_hf(loaded, root / "hf")
    parts = write_parts(root / "parts")
    few = {"max_steps": 1, "save_strategy": "no"}
    train(arguments(parts, root / "adapter", lora_enable=True, lora_r=2, **few))
    train(arguments(parts, root / "projector", tune_mm_mlp_adapter=True, **few))
    return {name: root / name for name in ("ours", "hf", "adapter", "projector")} | {"legacy": write_legacy(root)}


def changed(folder: Path, target: Path, place: list[str], value: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    put(config, place, value)
    (target / "config.json").write_text(json.dumps(config))
    return target


def put(content: dict[str, Any], place: list[str], value: Any) -> None:
    for name in place[:-1]:
        content = content[name]
    content[place[-1]] = value


PLACES = [
    *((kind, ["text_config", key]) for kind in ("ours", "hf") for key in KEYS),
    *((kind, ["vision_config", key]) for kind in ("ours", "hf") for key in TOWER_KEYS),
    *(("legacy", [key]) for key in KEYS),
]


@pytest.mark.parametrize(("kind", "place"), PLACES)
def test_a_size_that_no_model_has_is_named(
    tmp_path: Path, folders: dict[str, Path], kind: str, place: list[str]
) -> None:
    for number, value in enumerate(BAD):
        folder = changed(folders[kind], tmp_path / str(number), place, value)
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=rf"config\.json: {'.'.join(place)} is .*; expected ") as caught:
            Checkpoint.open(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 22 and "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_the_commands_end_in_one_line(
    tmp_path: Path, folders: dict[str, Path], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(folders["ours"], tmp_path / "bad", ["text_config", "num_hidden_layers"], 10**9)
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", command, str(folder)])
    assert ended.value.code in {1, 2}
    found = capsys.readouterr()
    assert (
        "text_config.num_hidden_layers is '1000000000'; expected a whole number from 1 to 10000"
        in found.out + found.err
    )


SLOW = [
    "(a+)+$", "(?:a|aa)*$", "(?:(?:a|ab){9}){9}", "(?:a?){40}", ".?" * 30 + "!", ".??" * 30 + "!", ".*" * 5 + "!",
    ".{0,60}" * 5 + "!", "(?:.|..)" * 30 + "!", "(?i:" + "(?:sx|\u017fx)" * 30 + ")", "()(?(1).*.*.*.*.*|b)!",
    "()(?(1)b|(?:.*)*)!", "(?=.*.*.*.*.*)x",
]  # fmt: skip
QUICK = [
    "all-linear", r".*\.(q_proj|k_proj|v_proj|o_proj)", r"^(?!.*vision).*(?:q|k|v)_proj$", "(?:foo|bar)*x",
    r".*\.layers\.[0-9]+\.(self_attn|mlp)\.(q_proj|down_proj)", r".*\.layers\.(?:[0-9]|1[0-9])\..*",
    r"(?:.*?(?:vision|language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj|up_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
]  # fmt: skip
"""Patterns of published adapters, and neighbors of slow ones."""


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_could_take_long_are_refused(pattern: str) -> None:
    for value in (pattern, [pattern], {pattern: 2}):
        with pytest.raises(CheckpointError, match=r"rank_pattern has the pattern .* could take long"):
            check_patterns({"rank_pattern": value}, Path("adapter_config.json"))


@pytest.mark.parametrize("pattern", QUICK)
def test_patterns_of_published_adapters_are_accepted(pattern: str) -> None:
    check_patterns({"target_modules": pattern, "exclude_modules": None}, Path("adapter_config.json"))


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
CRAFTED: list[tuple[str, str, list[str], Any]] = [
    *(
        ("ours", name, [], DEEP)
        for name in (
            "config.json",
            "llava_processor.json",
            "preprocessor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    ),
    ("ours", "config.json", ["text_config", "num_hidden_layers"], 10**9),
    ("ours", "config.json", ["text_config", "dtype"], "x"),
    ("ours", "config.json", ["text_config", "model_type"], "x"),
    ("ours", "config.json", ["vision_config", "hidden_size"], [[32]]),
    ("ours", "llava_processor.json", ["num_image_tokens"], 10**9),
    ("ours", "llava_processor.json", ["prefix_mark"], {"a": 1}),
    ("ours", "preprocessor_config.json", ["crop_size"], {"height": 42, "width": 42}),
    ("ours", "preprocessor_config.json", ["crop_size"], {"height": 28, "width": 14}),
    ("ours", "preprocessor_config.json", ["crop_size"], 0),
    ("ours", "preprocessor_config.json", ["crop_size"], 10**9),
    ("ours", "preprocessor_config.json", ["image_processor_type"], ""),
    ("ours", "preprocessor_config.json", ["size"], {"shortest_edge": -1}),
    ("ours", "preprocessor_config.json", ["size"], {"shortest_edge": 1.5}),
    ("ours", "preprocessor_config.json", ["resample"], None),
    ("ours", "preprocessor_config.json", ["image_mean"], {}),
    ("ours", "preprocessor_config.json", ["image_std"], [0, 0, 0]),
    ("ours", "config.json", ["image_token_index"], 7),
    ("ours", "config.json", ["text_config", "attention_dropout"], 1.5),
    ("ours", "config.json", ["template"], [[1]]),
    ("ours", "config.json", ["plugins"], -1),
    ("ours", "config.json", ["vision_feature_layer"], 42),
    (
        "ours",
        "tokenizer.json",
        ["post_processor"],
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    ),
    ("adapter", "adapter_config.json", ["megatron_config"], {"a": 1}),
    ("adapter", "adapter_config.json", ["target_modules"], "(a+)+$"),
    ("adapter", "adapter_config.json", ["target_modules"], "("),
    ("adapter", "adapter_config.json", ["rank_pattern"], {".*.*.*.*.*.*x": 2}),
    ("adapter", "adapter_config.json", ["r"], "x"),
    ("adapter", "llava_origin.json", ["build"], []),
    ("adapter", "llava_origin.json", ["build", "use_im_patch_token"], 10**9),
    ("adapter", "llava_origin.json", ["build", "lm"], 3),
    ("adapter", "llava_origin.json", [], DEEP),
    ("adapter", "adapter_config.json", [], DEEP),
    ("projector", "llava_origin.json", ["build", "select_layer"], 42),
    ("projector", "config.json", ["text_config", "hidden_act"], [[1]]),
    ("projector", "config.json", [], DEEP),
    ("ours", "config.json", ["text_config", "model_type"], {"a": 1}),
    ("ours", "tokenizer.json", ["pre_tokenizer"], []),
    ("ours", "tokenizer.json", ["model", "unk_token"], -1),
    ("ours", "tokenizer.json", ["model", "dropout"], -1),
    ("ours", "tokenizer.json", ["version"], []),
    ("hf", "config.json", [], DEEP),
    ("hf", "config.json", ["llava_source", "dicom"], -1),
    ("hf", "config.json", ["text_config", "vocab_size"], -1),
    ("hf", "tokenizer.json", ["decoder"], {"type": []}),
    ("legacy", "config.json", [], DEEP),
    ("legacy", "config.json", ["hidden_size"], "32"),
    ("legacy", "tokenizer.json", ["normalizer"], 7),
]


TRIED = [
    (command, crafted)
    for crafted in CRAFTED
    for command in ("chat", "eval", "train", "checkpoint convert")
    if crafted[0] not in ("adapter", "projector") or command != "checkpoint convert"  # which reads their tensors only
]


@pytest.mark.parametrize(
    ("command", "crafted"), TRIED, ids=[f"{c} {x[0]} {x[1]} {x[2]} {str(x[3])[:12]}" for c, x in TRIED]
)
def test_commands_on_crafted_files_end_in_one_line(
    tmp_path: Path, folders: dict[str, Path], command: str, crafted: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    kind, file, place, value = crafted
    folder = shutil.copytree(folders[kind], tmp_path / "bad")
    content = json.loads((folder / file).read_text())
    if place:
        put(content, place, value)
    (folder / file).write_text(json.dumps(content) if place else value)
    write_tiny_vqa(tmp_path / "vqa")
    words = {
        "chat": ["--image", "vqa/images/0.png", "--question", "Is it?"],
        "eval": ["--data", "vqa/train.json", "--image-folder", "vqa/images", "--out", "out", "--controls", "none"],
        "train": ["--data-path", "vqa/train.json", "--image-folder", "vqa/images", "--output-dir", "out"],
        "checkpoint convert": ["bad", "out", "--to", "model" if kind == "legacy" else "legacy"],
    }[command]
    if command in ("chat", "eval"):
        words = ["--model", "bad", "--device", "cpu", *words]
    elif command == "train":
        words = ["--model-name-or-path", "bad", "--bf16", "False", "--max-steps", "1", *words]
    with contextlib.chdir(tmp_path), pytest.raises(SystemExit) as ended:
        main([*command.split(), *words])
    shown = capfd.readouterr().err
    [line] = [line for line in shown.splitlines() if line.startswith("llava: error: ")]
    assert ended.value.code == 2 and len(line) < 1000
    assert "Traceback" not in shown and not any(
        (tmp_path / "out" / name).exists() for name in ("results.json", "config.json")
    )


SENSELESS = [
    *([part, key] for part in ("text_config", "vision_config") for key in ("num_attention_heads", "hidden_size")),
    ["text_config", "num_key_value_heads"], ["text_config", "head_dim"], ["vision_config", "patch_size"],
]  # fmt: skip


@pytest.mark.parametrize("kind", ["ours", "hf"])
@pytest.mark.parametrize("value", [0, 7, 999_999])
@pytest.mark.parametrize("place", SENSELESS, ids=".".join)
def test_sizes_that_do_not_fit_each_other_or_the_weights_are_one_line(
    tmp_path: Path, folders: dict[str, Path], kind: str, place: list[str], value: int
) -> None:
    folder = changed(folders[kind], tmp_path / "bad", place, value)
    with pytest.raises(LlavaError) as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("place", [["image_token_index"], ["vision_feature_layer"], ["text_config"], ["vision_config"]])
@pytest.mark.parametrize("value", [1.5, "x", {"a": 1}, True])
@pytest.mark.parametrize("kind", ["ours", "hf"])
def test_values_of_another_type_are_one_line(
    tmp_path: Path, folders: dict[str, Path], kind: str, place: list[str], value: Any
) -> None:
    config = json.loads((folders[kind] / "config.json").read_text())
    place = ["image_token_id"] if place == ["image_token_index"] and "image_token_id" in config else place
    folder = changed(folders[kind], tmp_path / "bad", place, copy.deepcopy(value))
    with pytest.raises(LlavaError):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", BAD)
def test_parts_of_a_new_model_are_checked(tmp_path: Path, value: Any) -> None:
    lm = changed(write_tiny_lm(tmp_path / "lm"), tmp_path / "bad lm", ["num_hidden_layers"], value)
    tower = changed(write_tiny_tower(tmp_path / "tower"), tmp_path / "bad tower", ["num_hidden_layers"], value)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is .*; expected a whole number from 1 to 10000"):
        language_config(str(lm))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is .*; expected a whole number from 1 to 10000"):
        load_tower(str(tower), dtype=None)  # type: ignore[arg-type]


def test_a_deep_configuration_is_one_line(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    for _ in range(200):
        content = {"a": content}
    with pytest.raises(CheckpointError, match="nested more than 100 levels"):
        check_sizes(content, tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Checkpoint.open(tmp_path)


def test_every_configuration_of_the_library_is_within_the_bounds() -> None:
    num_checked = 0
    for name, kind in CONFIG_MAPPING.items():
        try:
            content = kind().to_dict()
        except Exception:  # some have no defaults
            continue
        check_sizes(content, Path(name))
        num_checked += 1
    assert num_checked > 300
