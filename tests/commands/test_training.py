"""Published training commands run as printed, except for paths, model, port and number of processes."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.model.builder import build_model
from tests.support.ports import free_ports
from tests.support.processes import run_command
from tests.support.ranks import run_ranks
from tests.support.runs import train_published
from tests.support.tiny import write_tiny_lm, write_tiny_tower, write_tiny_vqa

ROOT = Path(__file__).resolve().parents[2]

STAGE_1 = """torchrun --nnodes=1 --nproc_per_node=8 --master_port=25001 llava/train/train_mem.py
    --model_name_or_path ./checkpoints/llava-7b-v0
    --data_path /path/to/pubmed_600k.json --image_folder /path/to/pubmed_600k
    --vision_tower openai/clip-vit-large-patch14
    --tune_mm_mlp_adapter True --mm_vision_select_layer -2 --mm_use_im_start_end --bf16 True
    --output_dir ./checkpoints/llava-med-7b-pretrain
    --num_train_epochs 1 --per_device_train_batch_size 2 --per_device_eval_batch_size 4
    --gradient_accumulation_steps 8 --evaluation_strategy "no" --save_strategy "steps" --save_steps 2400
    --save_total_limit 1 --learning_rate 2e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
    --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True --lazy_preprocess True
    --report_to none"""

STAGE_2 = """torchrun --nnodes=1 --nproc_per_node=8 --master_port=25001 llava/train/train_mem.py
    --model_name_or_path /path/to/llama-med-vicuna-7b
    --data_path /path/to/llava_med_instruct_60k_inline_mention_post.jsonl
    --image_folder /data/to/llava_med_instruct_images
    --vision_tower openai/clip-vit-large-patch14
    --mm_vision_select_layer -2 --mm_use_im_start_end True --bf16 True
    --output_dir /path/to/checkpoint_llava_med_instruct_60k_inline_mention
    --num_train_epochs 3 --per_device_train_batch_size 1 --per_device_eval_batch_size 4
    --gradient_accumulation_steps 8 --evaluation_strategy "no" --save_strategy "steps" --save_steps 5000
    --save_total_limit 3 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
    --logging_steps 1 --tf32 True --fsdp "full_shard auto_wrap"
    --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer'
    --model_max_length 2048 --gradient_checkpointing True --lazy_preprocess True --report_to wandb"""

VQA = (
    STAGE_2.replace("/path/to/llama-med-vicuna-7b", "/path/to/checkpoint_llava_med_instruct_60k_inline_mention")
    .replace("/path/to/llava_med_instruct_60k_inline_mention_post.jsonl", "/path/to/eval/vqa_rad/train.json")
    .replace("/data/to/llava_med_instruct_images", "/path/to/eval/vqa_rad/images")
    .replace(
        "--output_dir /path/to/checkpoint_llava_med_instruct_60k_inline_mention",
        "--output_dir /path/to/checkpoint_llava_med_instruct_60k_inline_mention/eval/fine_tuned/vqa_rad",
    )
)


def run_changed(command: str, start: Path, **changed: object) -> str:
    """Run a printed command with some values changed; return its output.

    Args:
        command: the printed command.
        start: a `torchrun`; or a file for the output of ranks that come from the fork server of the tests.
        changed: values by the names of their options.
    """
    words = shlex.split(command)
    changed |= {"nproc_per_node": 2, "master_port": free_ports(1)[0]}
    for name, value in changed.items():
        with_equals = [index for index, word in enumerate(words) if word.startswith(f"--{name}=")]
        if with_equals:
            words[with_equals[0]] = f"--{name}={value}"
        else:
            words[words.index(f"--{name}") + 1] = str(value)
    if start.name != "torchrun":
        run_ranks(2, train_published, words[words.index("llava/train/train_mem.py") + 1 :], start)
        return start.read_text()
    words[0] = str(start)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = run_command(words, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model, a tower and 40 rows."""
    folder = tmp_path_factory.mktemp("parts")
    write_tiny_lm(folder / "lm")
    write_tiny_tower(folder / "tower")
    write_tiny_vqa(folder / "vqa", 10, 4)
    return folder


@pytest.fixture(scope="module")
def stage_1(parts: Path, python: Path) -> tuple[Path, str]:
    """The output folder of stage 1, and the output of the command."""
    return parts / "stage1", run_stage(STAGE_1, parts, parts / "lm", parts / "stage1", python.with_name("torchrun"))


@pytest.fixture(scope="module")
def stage_2(parts: Path, stage_1: tuple[Path, str]) -> tuple[Path, str]:
    """The output folder of stage 2, which starts from stage 1."""
    return parts / "stage2", run_stage(STAGE_2, parts, stage_1[0], parts / "stage2", parts / "stage2.log")


def run_stage(command: str, parts: Path, model: Path, output: Path, start: Path) -> str:
    data = {"data_path": parts / "vqa" / "train.json", "image_folder": parts / "vqa" / "images"}
    return run_changed(
        command, start, model_name_or_path=model, vision_tower=parts / "tower", output_dir=output, **data
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], part: str) -> bool:
    """All tensors whose names hold `part` are bit-equal."""
    names = [name for name in first if part in name]
    assert names and all(name in second for name in names)
    return all(torch.equal(first[name], second[name]) for name in names)


def test_stage_1_writes_the_projector(stage_1: tuple[Path, str]) -> None:
    folder, written = stage_1
    old = torch.load(folder / "mm_projector.bin", weights_only=True)
    new = load_file(folder / "mm_projector.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert {"model.mm_projector.weight", "model.mm_projector.bias", "model.embed_tokens.weight"} <= old.keys()
    fresh = build_model(
        **json.loads((folder / "llava_origin.json").read_text())["build"]
    ).model.model.multi_modal_projector
    assert not torch.equal(fresh.weight, new["model.mm_projector.weight"])
    assert len(losses(folder)) == 2
    assert not list(folder.glob("model*.safetensors"))
    assert (folder / "loss_curve.png").stat().st_size > 1000
    assert "--lazy-preprocess" in written and written.count("--tf32 is ignored") == 1


def test_stage_1_moves_two_rows_of_the_table(parts: Path, stage_1: tuple[Path, str]) -> None:
    tokens = json.loads((stage_1[0] / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    before = load_file(parts / "lm" / "model.safetensors")["model.embed_tokens.weight"]
    after = load_file(stage_1[0] / "mm_projector.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(before, after[: len(before)])
    start = before.mean(dim=0)
    moved = [row for row in range(len(before), len(after)) if not torch.allclose(after[row], start, atol=1e-6)]
    assert moved == sorted(ids[marker] for marker in ("<im_start>", "<im_end>"))


def test_stage_2_starts_from_stage_1_and_leaves_the_tower(
    parts: Path, stage_1: tuple[Path, str], stage_2: tuple[Path, str]
) -> None:
    folder, written = stage_2
    trained = weights(folder)
    tower = {
        f"vision_tower.{name}": tensor for name, tensor in load_file(parts / "tower" / "model.safetensors").items()
    }
    kept = {name.partition("vision_tower.")[2]: tensor for name, tensor in trained.items() if "vision_tower." in name}
    original = {name.partition("vision_tower.")[2].removeprefix("vision_model."): t for name, t in tower.items()}
    compared = {name.removeprefix("vision_model."): tensor for name, tensor in kept.items()}
    assert compared and all(torch.equal(original[name], tensor) for name, tensor in compared.items())
    projector = load_file(stage_1[0] / "mm_projector.safetensors")["model.mm_projector.weight"]
    now = next(tensor for name, tensor in trained.items() if name.endswith("multi_modal_projector.weight"))
    assert not torch.equal(now, projector) and torch.allclose(now, projector, atol=5e-3)
    text = load_file(parts / "lm" / "model.safetensors")
    query = "layers.0.self_attn.q_proj.weight"
    assert not torch.equal(
        next(t for name, t in trained.items() if "language_model" in name and name.endswith(query)),
        text[f"model.{query}"],
    )
    assert len(losses(folder)) == 9
    assert len(re.findall("plain data parallelism", written)) == 1


def test_vqa_starts_from_stage_2(parts: Path, stage_2: tuple[Path, str]) -> None:
    folder = stage_2[0] / "eval" / "fine_tuned" / "vqa_rad"
    run_stage(VQA, parts, stage_2[0], folder, parts / "vqa.log")
    assert len(losses(folder)) == 9
    assert losses(folder)[0] == pytest.approx(losses(stage_2[0])[-1], abs=0.3)
    assert same(weights(stage_2[0]), weights(folder), "vision_tower.")
    assert not same(weights(stage_2[0]), weights(folder), "language_model.")


def test_commands_are_the_printed_ones(shared: Path) -> None:
    text = (shared / "specs" / "commands.md").read_text(encoding="utf-8").replace("\\\n", " ")
    printed = [shlex.split(line) for line in text.splitlines() if line.startswith("torchrun")]
    assert [shlex.split(command) for command in (STAGE_1, STAGE_2, VQA)] == printed
