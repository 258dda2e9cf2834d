"""Preference training runs: loss at the start, cached references, resuming, batches, and what a run learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from llava.errors import LlavaError
from llava.train.callbacks import ChosenCallback
from llava.train.counts import TrainingCounts
from tests.support.pairs import pair_arguments, write_pairs
from tests.support.ranks import run_ranks
from tests.support.runs import losses, metrics, train, write_parts

KINDS: dict[str, dict[str, object]] = {
    "adapter": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.5},
    "tower adapter": {"lora_enable": True, "lora_r": 4, "vit_lora_enable": True, "lora_r_vit": 2},
    "projector": {"tune_mm_mlp_adapter": True},
    "model": {"unfreeze_mm_vision_tower": True},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_pairs(folder / "pairs")
    return folder


def lines(folder: Path) -> list[dict]:
    files = sorted(folder.glob("reference-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_log_2(parts: Path, tmp_path: Path, kind: str, world_size: int) -> None:
    size = 4 // world_size
    run_ranks(
        world_size, train, pair_arguments(parts, tmp_path, **KINDS[kind], per_device_train_batch_size=size, max_steps=1)
    )
    first = metrics(tmp_path)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5) and first["grad_norm"] > 0
    assert len({line["key"] for line in lines(tmp_path)}) == len(lines(tmp_path)) == 24
    assert len(list(tmp_path.glob("reference-*.jsonl"))) == world_size


def test_a_run_raises_the_margin_and_keeps_its_reference(parts: Path, tmp_path: Path) -> None:
    """Twenty steps do not change the reference, which a second run over it reads instead of computing it again."""
    data = write_pairs(tmp_path / "eight", 8)
    options = {"data_path": data, "image_folder": data.parent / "images", "per_device_train_batch_size": 8}
    options |= {**KINDS["adapter"], "learning_rate": 1e-2, "lr_scheduler_type": "constant", "eval_data_path": data}
    options |= {"max_steps": 30, "eval_strategy": "steps", "eval_steps": 30}
    train(pair_arguments(parts, tmp_path / "run", **options))
    margins = losses(tmp_path / "run", "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 1 and losses(tmp_path / "run")[-1] < 0.3
    (held_out,) = losses(tmp_path / "run", "eval_loss")
    assert held_out < losses(tmp_path / "run")[-1]
    assert losses(tmp_path / "run", "eval_rewards/accuracies") == [1.0]
    before = lines(tmp_path / "run")
    train(pair_arguments(parts, tmp_path / "run", **options, overwrite_output_dir=True))
    assert lines(tmp_path / "run") == before and len(before) == 16


def test_batch_and_accumulation_count_pairs(parts: Path, tmp_path: Path) -> None:
    for name, size in (("one", 8), ("eight", 1)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 3}
        train(pair_arguments(parts, tmp_path / name, **KINDS["adapter"], **options, pref_loss="sigmoid,sft"))
    assert losses(tmp_path / "eight") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for name in ("rewards/margins", "logps/chosen", "grad_norm"):
        assert losses(tmp_path / "eight", name) == pytest.approx(losses(tmp_path / "one", name), rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["crop", "blank", "swap"])
def test_damaged_images_change_with_the_epoch_and_have_a_reference(parts: Path, tmp_path: Path, kind: str) -> None:
    options = {**KINDS["adapter"], "pref_loss": "mdpo", "image_negative": kind, "max_steps": 6}
    train(pair_arguments(parts, tmp_path, **options))
    assert losses(tmp_path)[0] == pytest.approx(3 * math.log(2), abs=1e-4)  # three terms
    found = len({line["key"] for line in lines(tmp_path)})  # 12 pairs, 10 of them with an image, in 2 epochs of 3 steps
    assert 34 < found <= 44 if kind == "swap" else found == {"crop": 44, "blank": 34}[kind]
    assert losses(tmp_path)[-1] != pytest.approx(3 * math.log(2), abs=1e-3)


@pytest.mark.parametrize("single", [False, True])
def test_kto_of_pairs_and_of_single_answers(parts: Path, tmp_path: Path, single: bool) -> None:
    options = {**KINDS["adapter"], "pref_loss": "kto", "max_steps": 3, "learning_rate": 1e-2}
    if single:
        rows = json.loads((parts / "pairs" / "pairs.json").read_text())
        labeled = [
            {"prompt": row["prompt"], "completion": row[("chosen", "rejected")[number % 2]], "label": number % 2 == 0}
            | ({"image": row["image"]} if "image" in row else {})
            for number, row in enumerate(rows)
        ]
        options["data_path"] = tmp_path / "labeled.json"
        (tmp_path / "labeled.json").write_text(json.dumps(labeled))
    train(pair_arguments(parts, tmp_path / "run", **options))
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(0.5, abs=1e-5) and found[-1] != pytest.approx(0.5, abs=1e-3)
    assert losses(tmp_path / "run", "rewards/chosen")[-1] > losses(tmp_path / "run", "rewards/rejected")[-1]
    assert losses(tmp_path / "run", "mismatched_logratio")[0] == pytest.approx(0, abs=1e-5)
    assert not lines(tmp_path / "run")


@pytest.mark.parametrize(("loss", "workers"), [("kto", 0), ("kto", 1), ("mdpo", 0)])
def test_two_ranks_equal_one(parts: Path, tmp_path: Path, loss: str, workers: int) -> None:
    """The estimate of KTO is over the step on all ranks, and mismatched answers may be those of the other rank."""
    options: dict[str, object] = {**KINDS["adapter"], "pref_loss": loss, "max_steps": 3, "learning_rate": 1e-2}
    options |= {"dataloader_num_workers": workers}
    options |= {"image_negative": "noise"} if loss == "mdpo" else {}
    for size in (1, 2):
        argv = pair_arguments(parts, tmp_path / str(size), **options, per_device_train_batch_size=2 // size)
        run_ranks(size, train, argv)
    names = ["loss", "grad_norm", "rewards/chosen", "logps/rejected"]
    names += ["mismatched_logratio"] if loss == "kto" else []
    for name in names:
        one, two = (losses(tmp_path / str(size), name) for size in (1, 2))
        assert two == pytest.approx(one, rel=2e-4, abs=1e-5) and len(one) == 3, name
    if loss == "kto":
        assert abs(one[-1]) > 1e-3


def test_published_reference_and_dropout(parts: Path, tmp_path: Path) -> None:
    """The published reference drifts with the projector; the first step is equal, and dropout changes the next."""
    options = {**KINDS["adapter"], "learning_rate": 1e-2, "max_steps": 3}
    names = ("none", "policy_reference_inputs", "policy_reference_inputs,policy_dropout")
    for number, name in enumerate(names):
        train(pair_arguments(parts, tmp_path / str(number), **options, compat=name))
    own, shared, dropped = (losses(tmp_path / str(number)) for number in range(3))
    assert own[0] == pytest.approx(shared[0], abs=1e-5) and own[2] != pytest.approx(shared[2], abs=1e-5)
    assert dropped[0] == pytest.approx(shared[0], abs=1e-5)  # the adapter starts at 0
    assert dropped[1] != pytest.approx(shared[1], abs=1e-5)


def test_a_pass_that_was_cut_continues(parts: Path, tmp_path: Path) -> None:
    train(pair_arguments(parts, tmp_path, **KINDS["adapter"], max_steps=1))
    file = tmp_path / "reference-0.jsonl"
    text = file.read_text()
    kept = text.splitlines(keepends=True)[:10]
    file.write_text("".join(kept) + '{"key": "half')
    train(pair_arguments(parts, tmp_path, **KINDS["adapter"], max_steps=1, overwrite_output_dir=True))
    assert file.read_text().splitlines(keepends=True)[:10] == kept
    found = {line["key"]: line["logprob"] for line in lines(tmp_path)}
    expected = {line["key"]: line["logprob"] for line in map(json.loads, text.splitlines())}
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_file_of_log_probabilities_is_the_reference(parts: Path, tmp_path: Path) -> None:
    train(pair_arguments(parts, tmp_path / "first", **KINDS["adapter"], max_steps=1))
    file = tmp_path / "first" / "reference-0.jsonl"
    shifted = [json.loads(line) for line in file.read_text().splitlines()]
    for line in shifted:
        line["logprob"] -= 1.0
    file.write_text("".join(json.dumps(line) + "\n" for line in shifted))
    train(pair_arguments(parts, tmp_path / "second", **KINDS["adapter"], max_steps=1, ref_logprobs=file))
    first = metrics(tmp_path / "second")[0]
    assert first["rewards/chosen"] == pytest.approx(0.1, abs=1e-5) and not lines(tmp_path / "second")
    file.write_text("".join(json.dumps(line) + "\n" for line in shifted[:-2]))
    with pytest.raises(LlavaError, match="holds no log-probability of it"):
        train(pair_arguments(parts, tmp_path / "third", **KINDS["adapter"], ref_logprobs=file))


def test_a_dry_run_writes_no_reference(parts: Path, tmp_path: Path) -> None:
    train(pair_arguments(parts, tmp_path / "dry", **KINDS["adapter"], dry_run=True))
    assert not lines(tmp_path / "dry")


def test_unusable_pairs_are_listed(parts: Path, tmp_path: Path) -> None:
    rows = json.loads((parts / "pairs" / "pairs.json").read_text())
    rows[1]["image"] = "absent.png"
    rows[2]["rejected"] = rows[2]["chosen"]
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps(rows))
    options = {**KINDS["adapter"], "data_path": data, "max_steps": 1}
    with pytest.raises(LlavaError, match=r"pairs.json, row 2: .*equal"):
        train(pair_arguments(parts, tmp_path / "run", **options))
    train(pair_arguments(parts, tmp_path / "run", **options, skip_bad=True))
    listed = [json.loads(line)["row"] for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(listed) == [1, 2]


def test_questions_are_answered_at_every_validation(parts: Path, tmp_path: Path) -> None:
    options = {**KINDS["adapter"], "eval_vqa_path": parts / "vqa" / "train.json", "max_steps": 2}
    options |= {"eval_image_folder": parts / "vqa" / "images", "eval_answers": 6}
    options |= {"eval_strategy": "steps", "eval_steps": 1}
    train(pair_arguments(parts, tmp_path, **options))
    for name in ("eval_vqa_open_recall", "eval_vqa_words"):
        assert len(losses(tmp_path, name)) == 2
    assert not losses(tmp_path, "eval_loss")


def test_a_warning_when_chosen_answers_fall(caplog: pytest.LogCaptureFixture) -> None:
    counts = TrainingCounts()
    callback = ChosenCallback(counts)
    warned = []
    for ratio in (0.1, 0.2, 0.1, -0.1, -0.05, -0.2, None):  # per token, in one window after another; None: no pairs
        caplog.clear()
        counts.clear()
        if ratio is not None:
            counts.add_metrics({"logratio/chosen": torch.tensor([4 * ratio, 4.0])})
        callback.on_log(TrainingArguments("x", use_cpu=True), TrainerState(), TrainerControl(), {})
        warned.append("becoming less likely" in caplog.text)
    assert warned == [False, False, False, True, False, True, False]
