"""Scores of answers to held-out questions during training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava.data.collator import Collator
from llava.data.dataset import SFTDataset
from llava.data.records import load_samples
from llava.errors import DataError
from llava.model.builder import LoadedModel
from llava.train.objectives.sft import SFT
from llava.train.validation import HeldOutAnswers, HeldOutLoss, answer_score
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, losses, train, write_parts
from tests.support.tiny import write_tiny_vqa


@pytest.mark.parametrize(
    ("reference", "answer", "closed", "value"),
    [
        ("yes", "Yes, there is.", True, 1.0),
        ("no", "normal", True, 0.0),
        ("No.", "no yes", True, 1.0),
        ("PA", "pa", True, 1.0),
        ("left lung", "the LEFT side", False, 0.5),
        ("left lung", "", False, 0.0),
        ("a a b", "a", False, 2 / 3),
    ],
)
def test_scores(reference: str, answer: str, closed: bool, value: float) -> None:
    assert answer_score(reference, answer, closed=closed) == pytest.approx(value)


def test_closed_questions(tiny: LoadedModel, tmp_path: Path) -> None:
    rows = json.loads((write_tiny_vqa(tmp_path) / "train.json").read_text())

    def closed(**changes: object) -> list[bool]:
        (tmp_path / "rows.json").write_text(json.dumps([{**row, **changes} for row in rows]))
        samples = load_samples(tmp_path / "rows.json")
        return HeldOutAnswers(samples, tiny.processor, image_folder=None, num_rows=100).closed

    assert closed() == [False, True] * 6 and closed(answer_type=None) == [False, True] * 6
    with pytest.raises(DataError, match="'maybe' is unknown"):
        closed(answer_type="maybe")


def test_the_loss_is_the_mean_over_supervised_tokens(tiny: LoadedModel, tmp_path: Path) -> None:
    folder, processor, objective = write_tiny_vqa(tmp_path), tiny.processor, SFT()
    samples = load_samples(folder / "train.json")
    dataset = SFTDataset(samples, processor, image_folder=folder / "images", max_length=2048)
    collator = Collator(dataset, processor.image_token_id, processor.pad_token_id)
    batches = [collator([(row, dataset[row])]).rows[0] for row in range(len(samples))]
    with torch.no_grad():
        total = sum(float(objective(tiny.model, batch, num_items=torch.ones(1)).loss) for batch in batches)
    count = sum(float(objective.count(batch).sum()) for batch in batches)
    found = [HeldOutLoss(collator, objective, batch_size=size)(tiny.model)["eval_loss"] for size in (1, 4, 12)]
    assert count > len(batches) and found == pytest.approx([total / count] * 3, rel=1e-5)


def test_rows_are_spread_over_file_and_ranks(tiny: LoadedModel, tmp_path: Path) -> None:
    samples = load_samples(write_tiny_vqa(tmp_path) / "train.json")

    def asked(num_rows: int, **ranks: int) -> list[str]:
        answers = HeldOutAnswers(samples, tiny.processor, image_folder=None, num_rows=num_rows, **ranks)
        return [sample.id for sample in answers.samples]

    assert asked(3) == ["0-0", "1-0", "2-0"] and len(asked(100)) == 12
    assert sorted(asked(5, rank=0, world_size=2) + asked(5, rank=1, world_size=2)) == sorted(asked(5))


def test_what_was_learned_is_answered(tmp_path: Path) -> None:
    """Training on the held-out rows raises their scores to 1, and validation does not change training."""
    parts = write_parts(tmp_path / "parts")
    rows = json.loads((parts / "vqa" / "train.json").read_text())
    for row in rows:
        row["conversations"][1]["value"] = "yes"
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    options = {"data_path": data, "learning_rate": 1e-2, "num_train_epochs": 15, "lr_scheduler_type": "constant"}
    validated = {"eval_data_path": data, "eval_strategy": "steps", "eval_steps": 5}
    train(arguments(parts, tmp_path / "without", **options))
    train(arguments(parts, tmp_path / "with", **options, **validated))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    for name in ("eval_closed_accuracy", "eval_open_recall"):
        found = losses(tmp_path / "with", name)
        assert len(found) == 9 and found[0] < 1.0 and found[-1] == 1.0


def test_two_ranks_score_as_one(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    held_out = {"eval_data_path": parts / "vqa" / "train.json", "eval_answers": 5}
    run_ranks(1, train, arguments(parts, tmp_path / "one", **held_out))
    run_ranks(2, train, arguments(parts, tmp_path / "two", **held_out, per_device_train_batch_size=2))
    for name in ("eval_loss", "eval_closed_accuracy", "eval_open_recall"):
        assert losses(tmp_path / "one", name) == pytest.approx(losses(tmp_path / "two", name), rel=1e-5)
