"""Scripts of LLaVA-Med: paths come first, published values are passed on; two nodes compute what one machine does."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from llava.model.checkpoint.save import save_model
from tests.support.ports import free_ports
from tests.support.processes import run_command
from tests.support.ranks import run_ranks
from tests.support.recorder import recorded_calls, write_recorder
from tests.support.runs import losses, train_published, write_parts
from tests.support.tiny import tiny_llava, write_tiny_vqa

ROOT = Path(__file__).resolve().parents[2]

TRAINING = [
    "pretrain.sh", "instruct.sh", "run_training_llava_med.sh", "finetune_vqa_rad.sh", "finetune_slake.sh",
    "finetune_pathvqa.sh",
]  # fmt: skip

KEPT = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
KEPT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(script: str, *words: object, cwd: Path, **environment: object) -> tuple[int, str]:
    """Return the status and the output of a script; its environment has only what is given and the machine needs."""
    given = {name: str(value) for name, value in environment.items() if value is not None}
    command = ["bash", ROOT / "scripts" / "llava_med" / script, *words]
    done = run_command(command, cwd=cwd, env=KEPT | given, timeout=900, joined=True)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for name in ("model", "images", "tower"):
        (folder / name).mkdir()
    (folder / "rows.json").write_text("[]")
    write_recorder(folder / "python")
    return {"MODEL": folder / "model", "DATA": folder / "rows.json", "IMAGES": folder / "images",
            "VISION_TOWER": folder / "tower", "PYTHON": folder / "python"}  # fmt: skip


def recorded(
    script: str, files: dict[str, Path], tmp_path: Path, *words: str, **environment: object
) -> list[list[str]]:
    """Return the command lines that a script starts."""
    given = {**files, **environment, "RECORD": tmp_path / "record"}
    status, output = run(script, *words, cwd=tmp_path, **given)
    assert status == 0, output
    return recorded_calls(tmp_path / "record")


def value(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize("script", [*TRAINING, "eval_med_dataset_batch.sh"])
@pytest.mark.parametrize("name", ["MODEL", "DATA", "IMAGES"])
def test_a_missing_path_is_named_before_anything_starts(
    script: str, name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    for given, expected in ((None, f"{name} is not set"), (tmp_path / "none" / "x", "does not exist")):
        status, output = run(script, cwd=tmp_path, RECORD=tmp_path / "record", **{**files, name: given})
        assert status == 2 and expected in output and output.count("\n") == 1
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"BATCH": "two"}, "BATCH must be a whole number, got two"),
        ({"EPOCHS": "0"}, "EPOCHS must be a number above 0, got 0"),
        ({"NNODES": "2"}, "NNODES=2 also needs NODE_RANK (0 to 1) and MASTER_ADDR"),
        ({"DEEPSPEED": "none/zero.json"}, "DEEPSPEED=none/zero.json does not exist"),
    ],
)
def test_wrong_numbers_are_named(
    environment: dict[str, str], expected: str, files: dict[str, Path], tmp_path: Path
) -> None:
    status, output = run("instruct.sh", cwd=tmp_path, **{**files, **environment})
    assert status == 2 and expected in output


def test_stage_1_has_the_published_values(files: dict[str, Path], tmp_path: Path) -> None:
    [words] = recorded("pretrain.sh", files, tmp_path, NPROC=8)
    assert words[:6] == [
        "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=8", "--node_rank=0", "--master_addr=127.0.0.1",
    ]  # fmt: skip
    published = {"--learning_rate": "2e-3", "--per_device_train_batch_size": "2", "--save_steps": "2400",
                 "--num_train_epochs": "1", "--gradient_accumulation_steps": "8", "--tune_mm_mlp_adapter": "True",
                 "--mm_vision_select_layer": "-2", "--model_max_length": "2048", "--warmup_ratio": "0.03"}  # fmt: skip
    assert {name: value(words, name) for name in published} == published
    assert "--fsdp" not in words


@pytest.mark.parametrize("script", TRAINING[1:])
def test_later_stages_have_the_published_values(script: str, files: dict[str, Path], tmp_path: Path) -> None:
    [words] = recorded(script, files, tmp_path, "--seed", "7")
    published = {"--learning_rate": "2e-5", "--per_device_train_batch_size": "1", "--save_steps": "5000",
                 "--num_train_epochs": "3", "--gradient_accumulation_steps": "8", "--save_total_limit": "3",
                 "--fsdp": "full_shard auto_wrap", "--seed": "7"}  # fmt: skip
    assert {name: value(words, name) for name in published} == published
    assert value(words, "--fsdp_transformer_layer_cls_to_wrap") == "LlamaDecoderLayer"


def test_deepspeed_on_several_nodes(files: dict[str, Path], tmp_path: Path) -> None:
    nodes = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 29511, "NPROC": 4}
    [words] = recorded("instruct.sh", files, tmp_path, DEEPSPEED=ROOT / "scripts" / "zero2.json", EPOCHS=9, **nodes)
    assert words[2:7] == [
        "--nnodes=2", "--nproc_per_node=4", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29511",
    ]  # fmt: skip
    assert value(words, "--deepspeed").endswith("zero2.json") and value(words, "--num_train_epochs") == "9"
    assert "--fsdp" not in words


def test_answers_are_scored(files: dict[str, Path], tmp_path: Path) -> None:
    answered, scored = recorded("eval_med_dataset_batch.sh", files, tmp_path, NPROC=3)
    answers = str(files["MODEL"] / "test-answer-file.jsonl")
    assert answered[0].endswith("llava/eval/run_med_datasets_eval_batch.py")
    assert value(answered, "--num-chunks") == "3" and value(answered, "--answers-file") == answers
    assert scored[0].endswith("llava/eval/run_eval.py") and value(scored, "--pred") == answers


@pytest.mark.parametrize(  # finetune_vqa_rad.sh: below
    "script",
    [
        "pretrain.sh",
        "instruct.sh",
        *(pytest.param(name, marks=pytest.mark.extended) for name in TRAINING[2:] if name != "finetune_vqa_rad.sh"),
    ],
)
def test_a_script_trains_tiny_parts_on_two_processes(script: str, files: dict[str, Path], tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    given = {"MODEL": parts / "lm", "VISION_TOWER": parts / "tower", "DATA": parts / "vqa" / "train.json",
             "IMAGES": parts / "vqa" / "images", "OUT": tmp_path / "out", "NPROC": 2, "BATCH": 2,
             "ACCUMULATION": 1}  # fmt: skip
    words = ["--max_steps", "2", "--save_strategy", "no", "--bf16", "False", "--tf32", "False"]
    [started] = recorded(script, {**files, **given}, tmp_path, *words)
    assert "--nproc_per_node=2" in started
    place = next(index for index, word in enumerate(started) if word.endswith("train_mem.py"))
    run_ranks(2, train_published, started[place + 1 :], tmp_path / "log")
    written = "mm_projector.bin" if script == "pretrain.sh" else "model.safetensors"
    assert len(losses(tmp_path / "out")) == 2 and (tmp_path / "out" / written).is_file()


def test_two_processes_answer_and_the_answers_are_scored(tmp_path: Path, python: Path) -> None:
    loaded = tiny_llava()
    save_model(loaded.model, loaded.processor, tmp_path / "model")
    vqa = write_tiny_vqa(tmp_path / "vqa")
    given = {"MODEL": tmp_path / "model", "DATA": vqa / "train.json", "IMAGES": vqa / "images", "PYTHON": python}
    status, output = run(
        "eval_med_dataset_batch.sh", "--max-new-tokens", "2", "--device", "cpu", cwd=tmp_path, NPROC=2, **given
    )
    assert status == 0 and "open" in output, output[-2000:]
    answers = (tmp_path / "model" / "test-answer-file.jsonl").read_text().splitlines()
    assert len(answers) == len(json.loads((vqa / "train.json").read_text()))


def test_two_nodes_compute_the_losses_of_one_machine(tmp_path: Path, python: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    [port] = free_ports(1)
    given = {"MODEL": parts / "lm", "VISION_TOWER": parts / "tower", "DATA": parts / "vqa" / "train.json",
             "IMAGES": parts / "vqa" / "images", "PYTHON": python, "BATCH": 2, "ACCUMULATION": 1, "EPOCHS": 1,
             "MASTER_PORT": port}  # fmt: skip
    words = ["--save_strategy", "no", "--bf16", "False", "--tf32", "False", "--gradient_checkpointing", "False"]
    status, output = run("finetune_vqa_rad.sh", *words, cwd=tmp_path, NPROC=2, OUT=tmp_path / "one", **given)
    assert status == 0, output[-2000:]
    nodes = {"NNODES": 2, "NPROC": 1, "MASTER_ADDR": "127.0.0.1", "OUT": tmp_path / "two"}
    with ThreadPoolExecutor() as pool:
        node = partial(run, "finetune_vqa_rad.sh", *words, cwd=tmp_path, **nodes, **given)
        done = [pool.submit(node, NODE_RANK=rank) for rank in range(2)]
    assert [one.result()[0] for one in done] == [0, 0], done[0].result()[1][-2000:]
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
