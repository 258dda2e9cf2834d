"""Training runs on tiny parts: losses, saved files, logs, errors and recovery."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import LlavaError
from llava.model.checkpoint.load import load_checkpoint
from llava.train.callbacks import draw_curve
from llava.train.objectives.sft import SFT
from tests.support.runs import arguments, losses, metrics, saved, steps, train


@pytest.fixture(scope="module")
def plain(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary run of three steps."""
    folder = tmp_path_factory.mktemp("plain")
    train(arguments(parts, folder))
    return folder


@pytest.mark.parametrize("row", ['{"step": 2, "train_runtime": 1.0}', '{"step": 2, "loss": 1.0}'])
def test_a_run_without_two_losses_has_no_curve(row: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{row}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_run_folder(parts: Path, plain: Path) -> None:
    resolved = json.loads((plain / "resolved_arguments.json").read_text())
    assert resolved["training"]["gradient_accumulation_steps"] == 1
    assert resolved["data"]["data_path"].endswith("train.json")
    provenance = json.loads((plain / "provenance.json").read_text())
    for name in ("data_sha256", "model_sha256", "weights_sha256"):
        assert len(provenance[name]) == 64
    assert provenance["layout"] == "tree" and provenance["trains"] == "model"
    first = metrics(plain)[0]
    for name in ("loss", "learning_rate", "supervised_tokens_per_second", "samples_per_second", "peak_memory_gb"):
        assert first[name] > 0
    assert 0 <= first["shared_tokens"] < 1
    assert "vision tower" in (plain / "trainable_parameters.txt").read_text()
    assert (plain / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_it_learns_eight_rows_by_heart(parts: Path, tmp_path: Path) -> None:
    rows = json.loads((parts / "vqa" / "train.json").read_text())[:8]
    data = tmp_path / "eight.json"
    data.write_text(json.dumps(rows))
    options = {"num_train_epochs": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "data_path": data}
    train(arguments(parts, tmp_path / "run", **options, lr_scheduler_type="constant", mm_projector_type="mlp2x_gelu"))
    found = losses(tmp_path / "run")
    assert found[0] > 4 and found[-1] < 0.3


def test_memory_that_runs_out_once(
    parts: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is laid out in smaller rows, with one message and the same losses."""
    real = SFT.__call__
    rows = []

    def failing(self: SFT, model: Any, batch: Any, *, num_items: torch.Tensor) -> Any:
        rows.append(batch.num_tokens)
        if len(rows) == 2:
            raise torch.OutOfMemoryError("no memory")
        return real(self, model, batch, num_items=num_items)

    monkeypatch.setattr(SFT, "__call__", failing)
    with caplog.at_level(logging.WARNING):
        train(arguments(parts, tmp_path))
    assert losses(tmp_path) == pytest.approx(losses(plain), rel=1e-5)
    assert len(rows) > 4 and max(rows[2:]) <= max(rows[:2])
    assert sum("out of memory" in record.message for record in caplog.records) == 1


def test_memory_that_never_suffices(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: SFT, model: Any, batch: Any, *, num_items: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(SFT, "__call__", failing)
    with pytest.raises(LlavaError, match="--max-tokens-per-row"):
        train(arguments(parts, tmp_path))


def test_validation_keeps_the_best_and_stops(parts: Path, tmp_path: Path) -> None:
    """With held-out loss that rises, the best checkpoint is kept and training stops early."""
    rows = json.loads((parts / "vqa" / "train.json").read_text())
    for row in rows:
        row["conversations"][1]["value"] = "zzzzzz"
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps(rows))
    folder = tmp_path / "run"
    options = {"num_train_epochs": 40, "learning_rate": 1e-2, "eval_strategy": "epoch", "save_strategy": "epoch"}
    options |= {"eval_data_path": held_out, "eval_answers": 4}
    options |= {"early_stopping_patience": 2, "lr_scheduler_type": "constant"}
    train(arguments(parts, folder, **options, save_total_limit=2))
    found = losses(folder, "eval_loss")
    best = found.index(min(found))
    assert len(found) == best + 3 < 40
    assert len(losses(folder, "eval_closed_accuracy")) == len(losses(folder, "eval_open_recall")) == len(found)
    kept = saved(folder / f"checkpoint-{3 * (best + 1)}")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in saved(folder).items())
    assert json.loads((folder / "trainer_state.json").read_text())["best_metric"] == pytest.approx(min(found))
    assert "eval_data_sha256" in json.loads((folder / "provenance.json").read_text())
    trained = saved(folder)
    train(arguments(parts, folder, **options, save_total_limit=2))  # stopped is stopped
    assert losses(folder, "eval_loss") == found
    assert all(torch.equal(tensor, trained[name]) for name, tensor in saved(folder).items())
    shutil.rmtree(folder / f"checkpoint-{3 * len(found)}")  # interrupted before the last validation
    train(arguments(parts, folder, **options, save_total_limit=2))
    assert losses(folder, "eval_loss") == found


def test_dry_run_writes_no_model(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(arguments(parts, tmp_path / "run", dry_run=True, num_train_epochs=3, log_row_ids=True))
    written = caplog.text
    for words in ("trained tokens", "AdamW moments", "20 real steps", "the run of 9 steps will take about"):
        assert words in written
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_dry_run_ignores_early_stopping(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"eval_data_path": parts / "vqa" / "train.json", "eval_answers": 0, "save_strategy": "epoch"}
    with caplog.at_level(logging.INFO):
        train(arguments(parts, tmp_path / "run", dry_run=True, early_stopping_patience=1, **options))
    assert "20 real steps" in caplog.text


def test_cached_features_train_alike(parts: Path, plain: Path, tmp_path: Path) -> None:
    cached = arguments(parts, tmp_path / "run", feature_cache_dir=tmp_path / "cache")
    train(cached)
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=1e-6)
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


@pytest.mark.parametrize("bad", ["image", "answer"])
def test_bad_rows_stop_before_training_or_are_listed(parts: Path, tmp_path: Path, bad: str) -> None:
    rows = json.loads((parts / "vqa" / "train.json").read_text())
    if bad == "image":
        rows[5]["image"] = "missing.png"
    else:
        rows[5]["conversations"][1]["value"] = 5.5
        rows[5]["conversations"][1]["from"] = "unknown"
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    folder = tmp_path / "run"
    with pytest.raises(LlavaError, match=r"rows\.json.*row 5") as failure:
        train(arguments(parts, folder, data_path=data))
    assert "\n" not in str(failure.value).strip() or "row 5" in str(failure.value)
    assert not (folder / "metrics.jsonl").exists()
    train(arguments(parts, folder, data_path=data, skip_bad=True))
    listed = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and listed[0]["row"] == 5
    again = {"eval_data_path": parts / "vqa" / "train.json", "overwrite_output_dir": True, "eval_answers": 0}
    train(arguments(parts, folder, data_path=data, skip_bad=True, **again))
    assert [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()] == listed
    assert steps(folder) == [1, 2, 3]


def test_gradient_checkpointing_changes_nothing(parts: Path, plain: Path, tmp_path: Path) -> None:
    train(arguments(parts, tmp_path, gradient_checkpointing=True))
    assert losses(tmp_path) == pytest.approx(losses(plain), rel=1e-6)
    assert losses(tmp_path, "grad_norm") == pytest.approx(losses(plain, "grad_norm"), rel=1e-5)


def test_gradient_checkpointing_with_a_frozen_language_model(parts: Path, tmp_path: Path) -> None:
    common = {"tune_mm_mlp_adapter": True}
    train(arguments(parts, tmp_path / "plain", **common))
    train(arguments(parts, tmp_path / "saving", **common, gradient_checkpointing=True))
    first, second = saved(tmp_path / "plain"), saved(tmp_path / "saving")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-6, rtol=1e-5)


def test_bf16(parts: Path, plain: Path, tmp_path: Path) -> None:
    """Weights stay float32, and losses are close to those of a float32 run."""
    train(arguments(parts, tmp_path, bf16=True))
    assert losses(tmp_path) == pytest.approx(losses(plain), rel=2e-2)
    assert losses(tmp_path) != losses(plain)
    assert all(tensor.dtype == torch.float32 for tensor in saved(tmp_path).values())


def test_worker_processes_change_nothing(parts: Path, plain: Path, tmp_path: Path) -> None:
    train(arguments(parts, tmp_path, dataloader_num_workers=1))
    assert losses(tmp_path) == losses(plain)


def test_text_only_rows(parts: Path, tmp_path: Path) -> None:
    rows = [row for row in json.loads((parts / "uneven.json").read_text()) if "image" not in row]
    data = tmp_path / "text.json"
    data.write_text(json.dumps(rows))
    train(arguments(parts, tmp_path / "run", data_path=data, image_folder=None))
    assert len(losses(tmp_path / "run")) == 1
    assert load_checkpoint(tmp_path / "run").processor.template.name == "v0"
