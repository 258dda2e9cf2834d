"""Scripts of STLLaVA-Med: published values, and commands that parse."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.cli import COMMANDS, split_command
from llava.instruct.preferences import judge
from llava.train.parsing import parse_training_args
from tests.support.fast_python import WITHOUT_BUILD
from tests.support.pairs import write_pairs
from tests.support.processes import run_command
from tests.support.recorder import recorded_calls, write_recorder
from tests.support.runs import losses, write_parts

ROOT = Path(__file__).resolve().parents[2]
WRITES_PAIRS = '[ "$1 $2" != "preferences pairs" ] || echo "[]" >"${@: -1}"\n'
"""The stage after the pairs is left out where their file is missing."""

PUBLISHED = """--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --version v1_sq
--mm_projector_type cluster --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
--image_aspect_ratio pad --group_by_modality_length False --bf16 True --num_train_epochs 3
--per_device_train_batch_size 8 --per_device_eval_batch_size 6 --gradient_accumulation_steps 4 --evaluation_strategy no
--save_strategy steps --save_steps 50000 --save_total_limit 2 --learning_rate 2e-4 --vision_tower_lr 5e-5
--vit_lora_enable --lora_alpha_vit 64 --lora_r_vit 32 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
--logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 8
--lazy_preprocess True --report_to wandb --data_aug False --sq_r 0.5"""


def run(script: str, *words: object, **environment: object) -> None:
    """Run a script with more variables; it must succeed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    env |= {name: str(value) for name, value in environment.items()}
    command = ["bash", str(ROOT / "scripts" / script), *map(str, words)]
    done = run_command(command, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    return write_recorder(tmp_path / "recorder", WRITES_PAIRS)


def test_published_values(tmp_path: Path, recorder: Path) -> None:
    record = tmp_path / "record"
    words = ["lm", "tower", "projector.bin", "rows.json", "images", tmp_path / "out", "--seed", "3"]
    run("sqllava_med.sh", *words, LAUNCH=recorder, RECORD=record, ZERO="scripts/zero3.json")
    [call] = recorded_calls(record)
    assert call[0] == str(ROOT / "llava" / "train" / "train_mem.py")
    text = " ".join(call)
    for part in " ".join(PUBLISHED.split()).split(" --"):
        assert part.removeprefix("--") in text, part
    for part in ("--deepspeed scripts/zero3.json", "--vision_tower tower", "--pretrain_mm_mlp_adapter projector.bin"):
        assert part in text
    assert call[-2:] == ["--seed", "3"]
    words = [word for word in call[1:] if word not in ("--deepspeed", "scripts/zero3.json")]
    parsed = parse_training_args(words)
    tower = parsed.parts_spec().tower_lora
    assert tower is not None and (tower.r, tower.alpha, tower.dropout) == (32, 64, 0.2)
    asking = parsed.training_rows().asking
    assert asking is not None and (asking.rate, asking.seed) == (0.5, 3)


def test_the_small_script_finds_the_packaged_parts() -> None:
    text = (ROOT / "scripts" / "stllava_med_small.sh").read_text(encoding="utf-8")
    names = re.findall(r"from (\S+) import (\w+); print\(\w+\.(\w+)", text)
    assert [name for *_, name in names] == ["language_model", "vision_tower"]
    for module, name, function in names:
        assert callable(getattr(importlib.import_module(f"{module}.{name}"), function))


def test_the_small_script_prints_commands_that_parse(tmp_path: Path, recorder: Path) -> None:
    for name in ("vqa-rad", "cxr-notes"):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [{"image": f"{number}.png"} for number in range(9)]
        (tmp_path / "data" / name / "train.json").write_text(json.dumps(rows))
    record, out = tmp_path / "record", tmp_path / "out"
    given: dict[str, Any] = {
        "LLAVA": recorder,
        "PYTHON": sys.executable,
        "LM": "lm",
        "TOWER": "tower",
        "RECORD": record,
    }
    run("stllava_med_small.sh", tmp_path / "data", out, ASKED=4, **given)
    assert len(json.loads((out / "asked-images.json").read_text())) == 4
    names = []
    for call in recorded_calls(record):
        name, words = split_command(call)
        names.append(name)
        module = importlib.import_module(COMMANDS[name].target.split(":")[0])
        if name == "train":
            parsed = parse_training_args(words)
            assert parsed.training.seed == 0
        elif name == "preferences judge":
            judge.make_parser(words[words.index("--by") + 1]).parse_args(words)
        elif hasattr(module, "make_parser"):
            module.make_parser().parse_args(words)
    assert names.count("train") == 4 and names.count("eval") == 3
    expected = {"ask", "data dialogues", "preferences answer", "preferences judge", "preferences pairs"}
    assert expected <= set(names)


SMALLER = (
    "--use_cpu True --bf16 False --tf32 False --report_to none --lora_r 4 --lora_r_vit 4 --lora_dropout_vit 0 "
    "--lora_dropout 0 --dataloader_num_workers 0 --model_max_length 512 --max_steps 2 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps"
)
"""Options of a machine without GPU and of tiny parts; all others are those of the scripts."""


def both_stages(folder: Path, out: Path, python: Path, world_size: int, **environment: object) -> None:
    """Run both scripts on tiny parts; stage 1 gives an adapter, on which stage 2 stands."""
    parts, pairs = folder / "parts", folder / "pairs" / "pairs.json"
    launch = f"{python} -m torch.distributed.run --standalone --nproc_per_node={world_size}"
    given: dict[str, Any] = {"LAUNCH": launch, "PYTHONPATH": ROOT, **environment}
    smaller = [*SMALLER.split(), 2 // world_size]
    rows = [parts / "vqa" / "train.json", parts / "vqa" / "images"]
    run("sqllava_med.sh", parts / "lm", parts / "tower", "", *rows, out / "sft", *smaller, **given)
    second = [out / "sft", "", "", pairs, pairs.parent / "images", out / "dpo", *smaller]
    run("dpo_finetune.sh", *second, "--learning_rate", 1e-3, "--warmup_ratio", 0, **given)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    """Parts, pairs, and both stages by one process (`one`)."""
    folder = tmp_path_factory.mktemp("stages")
    write_parts(folder / "parts")
    write_pairs(folder / "pairs", 8)
    both_stages(folder, folder / "one", python, 1)
    return folder


@pytest.mark.parametrize("zero", [pytest.param("", marks=pytest.mark.extended), "zero3.json"])
def test_both_stages_on_two_processes_equal_one(one_process: Path, python: Path, tmp_path: Path, zero: str) -> None:
    """Two processes take the steps of one with twice the batch, also with weights sharded over them."""
    sharded = {"ZERO": ROOT / "scripts" / zero, WITHOUT_BUILD: 1} if zero else {}
    both_stages(one_process, tmp_path, python, 2, **sharded)
    for stage in ("sft", "dpo"):
        one, two = (losses(folder / stage) for folder in (one_process / "one", tmp_path))
        assert len(one) == 2 and two == pytest.approx(one, rel=1e-3), stage
    assert one[0] == pytest.approx(math.log(2), abs=1e-4) and one[1] != pytest.approx(one[0], abs=1e-5)
