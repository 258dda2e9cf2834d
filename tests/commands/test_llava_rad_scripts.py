"""Scripts of LLaVA-Rad: paths are checked first, published values passed on; the whole chain runs on tiny parts."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from llava.eval.model_mimic_cxr import main as predict
from tests.support.fast_python import WITHOUT_BUILD
from tests.support.processes import have_ended, run_command, started
from tests.support.recorder import recorded_calls, write_recorder
from tests.support.tiny import tiny_image, write_tiny_lm, write_tiny_tower

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *words: object, cwd: Path, **environment: object) -> subprocess.CompletedProcess[str]:
    """Run a script; the environment has only what a test gives, and what the machine needs."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    given = {name: str(value) for name, value in environment.items() if value is not None}
    command = ["bash", ROOT / "scripts" / script, *words]
    removed = {name for name, value in environment.items() if value is None}
    env = {name: value for name, value in {**kept, **given}.items() if name not in removed}
    return run_command(command, cwd=cwd, env=env, timeout=900)


@pytest.fixture(scope="module")
def rad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny parts, an annotation file of twelve rows as published, with repeated ids and bare NaN, and its images."""
    folder = tmp_path_factory.mktemp("rad")
    files = folder / "files" / "p10"
    files.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(12):
        tiny_image(number).save(files / f"{number}.jpg")
        turns = [{"from": "human", "value": "<image>\nold"}, {"from": "gpt", "value": f"No effusion {number}."}]
        row = {"id": f"{number // 4}_{number // 2}", "image": f"mimic/p10/{number}.jpg", "conversations": turns}
        row |= {"generate_method": "rule-based", "reason": None if number % 3 else "cough", "view": "AP"}
        rows.append(row | {"chexpert_labels": {"Edema": float("nan")}})
    rows[10]["view"], rows[11]["conversations"][1]["value"] = float("nan"), None
    data = folder / "chat.json"
    data.write_text(json.dumps(rows))
    python = write_recorder(folder / "python")
    (folder / "projector.bin").write_bytes(b"")
    lm, tower = write_tiny_lm(folder / "lm"), write_tiny_tower(folder / "tower")
    return {"data": data, "images": folder / "files", "lm": lm, "tower": tower, "fake": python, "folder": folder}


def environment(rad: dict[str, Path], script: str, **changed: object) -> dict[str, object]:
    """Return a complete environment of a script with the recording interpreter."""
    found: dict[str, object] = {"image_folder": rad["images"], "model_base": rad["lm"], "PYTHON": rad["fake"]}
    found["query_file" if script == "eval.sh" else "data_path"] = rad["data"]
    if script == "finetune_lora.sh":
        found["PROJECTOR"] = rad["folder"] / "projector.bin"
    return {**found, **changed}


@pytest.mark.parametrize(
    ("script", "name"),
    [
        *((script, name) for script in ("pretrain.sh", "finetune_lora.sh") for name in ("data_path", "image_folder")),
        ("finetune_lora.sh", "PROJECTOR"),
        ("eval.sh", "query_file"),
        ("eval.sh", "image_folder"),
    ],
)
@pytest.mark.parametrize("value", [None, "", "/no/such/path"])
def test_a_missing_path_is_one_line_and_status_2(rad: dict[str, Path], script: str, name: str, value: Any) -> None:
    record = rad["folder"] / "record"
    done = run(script, cwd=rad["folder"], **environment(rad, script, RECORD=record, **{name: value}))
    assert done.returncode == 2 and not done.stdout
    said = f"{name}=/no/such/path does not exist" if value else f"{name} is not set"
    assert done.stderr.count("\n") == 1 and said in done.stderr
    assert not record.exists()


def test_a_missing_model_or_tower_is_named(rad: dict[str, Path]) -> None:
    done = run("pretrain.sh", cwd=rad["folder"], **environment(rad, "pretrain.sh", model_base="/no/model"))
    assert (done.returncode, "model_base=/no/model does not exist" in done.stderr) == (2, True)
    done = run("pretrain.sh", cwd=rad["folder"], **environment(rad, "pretrain.sh", vision_tower="./no/tower"))
    assert (done.returncode, "vision_tower=./no/tower does not exist" in done.stderr) == (2, True)
    done = run("eval.sh", "", "/no/model", cwd=rad["folder"], **environment(rad, "eval.sh"))
    assert (done.returncode, "model_path=/no/model does not exist" in done.stderr) == (2, True)


def values(words: list[str]) -> dict[str, str]:
    """Return the value after each option."""
    return {word: after for word, after in itertools.pairwise(words) if word.startswith("--")}


PUBLISHED = {
    "pretrain.sh": {
        "--version": "plain",
        "--tune_mm_mlp_adapter": "True",
        "--per_device_train_batch_size": "32",
        "--gradient_accumulation_steps": "2",
        "--learning_rate": "1e-3",
        "--num_train_epochs": "1",
        "--save_steps": "0.25",
    },
    "finetune_lora.sh": {
        "--version": "v1",
        "--lora_enable": "True",
        "--lora_alpha": "128",
        "--per_device_train_batch_size": "16",
        "--gradient_accumulation_steps": "1",
        "--learning_rate": "1e-4",
        "--num_train_epochs": "3",
        "--save_steps": "0.0833333",
    },
}
SHARED = {
    "--loader": "mimic_train_findings",
    "--vision_tower": "biomedclip_cxr_518",
    "--vision_tower_checkpoint": "biomedclipcxr_518_checkpoint.pt",
    "--mm_projector_type": "mlp2x_gelu",
    "--mm_vision_select_layer": "-2",
    "--mm_use_im_start_end": "False",
    "--mm_use_im_patch_token": "False",
    "--bf16": "True",
    "--tf32": "True",
    "--per_device_eval_batch_size": "4",
    "--evaluation_strategy": "no",
    "--save_strategy": "steps",
    "--save_total_limit": "1",
    "--weight_decay": "0.",
    "--warmup_ratio": "0.03",
    "--lr_scheduler_type": "cosine",
    "--logging_steps": "1",
    "--model_max_length": "2048",
    "--gradient_checkpointing": "True",
    "--dataloader_num_workers": "4",
    "--lazy_preprocess": "True",
    "--report_to": "wandb",
}


@pytest.mark.parametrize("script", PUBLISHED)
def test_published_values(rad: dict[str, Path], script: str, tmp_path: Path) -> None:
    done = run(script, cwd=tmp_path, **environment(rad, script, RECORD=tmp_path / "record"))
    assert done.returncode == 0, done.stderr
    [words] = recorded_calls(tmp_path / "record")
    assert words[0] == str(ROOT / "llava" / "train" / "train_mem.py")
    found = values(words)
    assert {**SHARED, **PUBLISHED[script]}.items() <= found.items()
    name = (tmp_path / "run_name").read_text().strip()
    assert found["--output_dir"] == f"./checkpoints/{name}" and found["--run_name"] == name
    kind = "pt-1e-1e-3" if script == "pretrain.sh" else "lora-3e-1e-4"
    assert name.startswith(f"biomedclip_cxr_518-{kind}-20") and "--deepspeed" not in words


def test_words_replace_defaults_and_further_options_go_on(rad: dict[str, Path], tmp_path: Path) -> None:
    given = environment(
        rad, "pretrain.sh", RECORD=tmp_path / "record", vision_tower=rad["tower"], loader="default", conv_mode="v1"
    )
    done = run("pretrain.sh", "out", 2, 8, "--max_steps", 5, cwd=tmp_path, **given)
    assert done.returncode == 0, done.stderr
    [words] = recorded_calls(tmp_path / "record")
    found = values(words)
    assert (found["--num_train_epochs"], found["--per_device_train_batch_size"]) == ("2", "8")
    assert (found["--gradient_accumulation_steps"], found["--loader"], found["--version"]) == ("2", "default", "v1")
    assert words[-2:] == ["--max_steps", "5"] and "--vision_tower_checkpoint" not in words
    assert found["--output_dir"].startswith("out/tower-pt-2e-1e-3-") and found["--save_steps"] == "0.125"


@pytest.mark.parametrize(("epochs", "batch"), [("none", 1), ("0", 1), ("1", "x"), ("1", "0")])
def test_numbers_are_checked(rad: dict[str, Path], epochs: str, batch: object) -> None:
    done = run("pretrain.sh", "out", epochs, batch, cwd=rad["folder"], **environment(rad, "pretrain.sh"))
    assert done.returncode == 2 and "must be a" in done.stderr and done.stderr.count("\n") == 1


def with_gpus(folder: Path, number: int) -> str:
    """Write a program that lists GPUs, and return the search path with it."""
    tool = folder / "nvidia-smi"
    lines = "".join(f"echo 'GPU {index}: fake'\n" for index in range(number))
    tool.write_text(f"#!/usr/bin/env bash\n{lines}")
    tool.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"NPROC": 2}, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
        ({"gpus": 2}, ["-m", "deepspeed.launcher.runner"]),
        ({"gpus": 2, "NPROC": 1}, ["-m", "deepspeed.launcher.runner", "--num_gpus", "1"]),
    ],
)
def test_launcher(rad: dict[str, Path], tmp_path: Path, changed: dict[str, Any], expected: list[str]) -> None:
    given = environment(rad, "pretrain.sh", RECORD=tmp_path / "record")
    if gpus := changed.pop("gpus", 0):
        changed |= {"PATH": with_gpus(tmp_path, gpus), "CUDA_VISIBLE_DEVICES": None}
    done = run("pretrain.sh", cwd=tmp_path, **given, **changed)
    assert done.returncode == 0, done.stderr
    [words] = recorded_calls(tmp_path / "record")
    place = words.index(str(ROOT / "llava" / "train" / "train_mem.py"))
    assert words[:place] == expected
    assert values(words).get("--deepspeed") == (str(ROOT / "scripts" / "zero2.json") if gpus else None)


def test_evaluation_starts_one_process_per_gpu(rad: dict[str, Path], tmp_path: Path) -> None:
    given = environment(
        rad, "eval.sh", RECORD=tmp_path / "record", PATH=with_gpus(tmp_path, 3), CUDA_VISIBLE_DEVICES=None
    )
    done = run("eval.sh", rad["lm"], rad["lm"], "out", "mine", "--limit", 4, cwd=tmp_path, **given)
    assert done.returncode == 0, done.stderr
    calls = recorded_calls(tmp_path / "record")
    chunks = [values(words) for words in calls if "--chunk_idx" in words]
    assert sorted(found["--chunk_idx"] for found in chunks) == ["0", "1", "2"]
    expected = {"--loader": "mimic_test_findings", "--conv_mode": "v1", "--temperature": "0", "--batch_size": "8"}
    for found in chunks:
        assert expected.items() <= found.items() and found["--num_chunks"] == "3" and found["--limit"] == "4"
        assert found["--prediction_file"] == f"out/test_{found['--chunk_idx']}.jsonl"
    assert calls[0][2] == "join" and "--out" not in calls[0]
    assert values(calls[-2])["--out"] == "out/mimic_cxr_preds.jsonl"
    assert values(calls[-1]) == {"--run_name": "mine", "--output_dir": "out/eval"}


def test_a_failed_chunk_ends_the_evaluation(rad: dict[str, Path], tmp_path: Path) -> None:
    python = write_recorder(tmp_path / "python", 'case "$*" in *"--chunk_idx 1"*) exit 3 ;; esac\n')
    given = environment(rad, "eval.sh", RECORD=tmp_path / "record", PYTHON=python, NUM_CHUNKS=2)
    done = run("eval.sh", rad["lm"], rad["lm"], "out", cwd=tmp_path, **given)
    assert done.returncode == 2 and "chunks 1 of 2 failed" in done.stderr
    assert not any("run.py" in " ".join(words) for words in recorded_calls(tmp_path / "record"))


def test_the_whole_chain_on_tiny_parts(rad: dict[str, Path], python: Path, tmp_path: Path) -> None:
    common = {"image_folder": rad["images"], "model_base": rad["lm"], "vision_tower": rad["tower"]}
    common |= {"PYTHON": python, "data_path": rad["data"]}
    small = ["--bf16", "False", "--report_to", "none", "--dataloader_num_workers", "0", "--disable_tqdm", "True"]
    two = {"NPROC": 2, "ZERO": ROOT / "scripts" / "zero2.json", WITHOUT_BUILD: 1}
    done = run("pretrain.sh", "out", 1, 2, 1, *small, cwd=tmp_path, RUN_NAME="stage1", **common, **two)
    assert done.returncode == 0, done.stderr[-3000:]
    projector = tmp_path / "out" / "stage1" / "mm_projector.bin"
    assert projector.is_file()
    given = {**common, **two, "PROJECTOR": projector}
    done = run("finetune_lora.sh", "out", 1, 2, *small, cwd=tmp_path, RUN_NAME="stage2", **given)
    assert done.returncode == 0, done.stderr[-3000:]
    model = tmp_path / "out" / "stage2"
    assert (model / "adapter_config.json").is_file() and (model / "non_lora_trainables.bin").is_file()
    assert len(list(model.glob("checkpoint-*"))) == 1
    _check_saved(rad, model, tmp_path)
    words = ["--model_path", model, "--model_base", rad["lm"], "--conv_mode", "v1", "--max_new_tokens", 6]
    words += ["--query_file", rad["data"], "--image_folder", rad["images"], "--loader", "mimic_test_findings"]
    predict([str(word) for word in [*words, "--prediction_file", tmp_path / "whole.jsonl", "--device", "cpu"]])
    assert _killed_evaluation(rad, tmp_path, model, python) == (tmp_path / "whole.jsonl").read_bytes()


def _check_saved(rad: dict[str, Path], model: Path, folder: Path) -> None:
    """Check that a stage-2 folder works as adapter, in plain peft, merged, and at its checkpoint."""
    from peft import PeftModel

    from llava.model.builder import build_model
    from llava.model.checkpoint.tools import doctor
    from llava.model.merge_lora import main as merge
    from llava.serve.findings import main as findings

    image = str(next((rad["images"] / "p10").iterdir()))
    [checkpoint] = model.glob("checkpoint-*")
    words = ["--max-new-tokens", "4", "--device", "cpu"]
    for place in (model, checkpoint):
        findings([image, "--model", str(place), "--model-base", str(rad["lm"]), *words])
        doctor.main([str(place)])
    merge(["--model-path", str(model), "--model-base", str(rad["lm"]), "--save-model-path", str(folder / "merged")])
    findings([image, "--model", str(folder / "merged"), *words])
    base = build_model(str(rad["lm"]), str(rad["tower"]), projector_type="mlp2x_gelu").model
    plain = PeftModel.from_pretrained(base, model)
    assert any(bool(value.any()) for name, value in plain.named_parameters() if "lora_B" in name)
    assert sum("lora_" in name for name, _ in plain.named_parameters()) == 2 * 2 * 7


def _killed_evaluation(rad: dict[str, Path], folder: Path, model: Path, python: Path) -> bytes:
    """Return the joined predictions of an evaluation in two chunks that was killed and started again."""
    given = {"query_file": rad["data"], "image_folder": rad["images"], "PYTHON": python, "NUM_CHUNKS": 2}
    words = (rad["lm"], model, "scores", "tiny", "--max_new_tokens", 6, "--batch_size", 1)
    env = {**os.environ, **{key: str(value) for key, value in given.items()}, "CUDA_VISIBLE_DEVICES": ""}
    part, deadline = folder / "scores" / "test_0.jsonl", time.monotonic() + 600
    command, mark = ["bash", ROOT / "scripts" / "eval.sh", *words], str(folder)
    with started(command, cwd=folder, env=env, mark=mark) as process:
        while not (part.is_file() and part.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert have_ended(mark, seconds=120), "its processes did not end with it"
    done = run("eval.sh", *words, cwd=folder, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Total reports: 10" in done.stdout and (folder / "scores" / "eval" / "metrics.json").is_file()
    return (folder / "scores" / "mimic_cxr_preds.jsonl").read_bytes()
