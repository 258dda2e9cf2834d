"""Training on images with variable numbers of tokens: each kind of run, its checkpoint, and answers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from llava.data import show_command
from llava.errors import ConfigError, DataError
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Prompt, Sampling
from llava.imaging.decode import load_image
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model
from llava.samples import Conversation, Turn
from llava.serve.cli import main as chat
from tests.support.runs import arguments, losses, saved, train, write_parts
from tests.support.tiny import tiny_image, tiny_llava

TILES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": "[[56, 28], [28, 56], [56, 56]]",
}
KEPT = {"image_aspect_ratio": "keep"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts with three images of different shapes, and a text-only row."""
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    for number, size in enumerate([(60, 28), (28, 50), (40, 40)]):
        tiny_image(number, 64).resize(size).save(folder / "vqa" / "images" / f"{number}.png")
    rows = json.loads((folder / "vqa" / "train.json").read_text())
    del rows[0]["image"]
    rows[0]["conversations"][0]["value"] = "Without an image?"
    (folder / "vqa" / "train.json").write_text(json.dumps(rows))
    return folder


def questions(parts: Path) -> list[Prompt]:
    return [
        Prompt(
            Conversation((Turn("human", "<image>\nQuestion?"),)), (load_image(parts / "vqa" / "images" / f"{n}.png"),)
        )
        for n in range(3)
    ]


@pytest.mark.parametrize("options", [TILES, KEPT], ids=["anyres", "keep"])
@pytest.mark.parametrize("kind", ["projector", "adapter", "model"])
def test_runs_of_every_kind(parts: Path, tmp_path: Path, options: dict[str, str], kind: str) -> None:
    kinds = {"projector": {"tune_mm_mlp_adapter": True}, "adapter": {"lora_enable": True, "lora_r": 2}, "model": {}}
    held_out = {"eval_data_path": parts / "vqa" / "train.json", "eval_strategy": "epoch", "eval_answers": 3}
    run = {**options, **kinds[kind], **held_out, "lora_dropout": 0.0, "num_train_epochs": 2}
    train(arguments(parts, tmp_path / "run", **run))
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded.processor.image_mode == loaded.model.config.image_aspect_ratio == options["image_aspect_ratio"]
    if options is TILES:
        newline = loaded.model.model.image_newline
        assert newline is not None and newline.shape == (32,)
        assert any("image_newline" in name for name in saved(tmp_path / "run"))
    answers = LocalEngine(loaded.model, loaded.processor).generate(questions(parts), Sampling(max_new_tokens=3))
    assert all(answer.finish != "error" for [answer] in answers)


def test_the_loss_is_that_of_single_rows(parts: Path, tmp_path: Path) -> None:
    """For one step on all rows, the layout and the size of the batch do not change the result."""
    base = {**TILES, "max_steps": 1, "per_device_train_batch_size": 12, "learning_rate": 1e-3}
    ways = {"tree": {}, "flat": {"prefix_sharing": "off"}, "short rows": {"max_tokens_per_row": 200}}
    for name, way in ways.items():
        train(arguments(parts, tmp_path / name, **base, **way))
    first = losses(tmp_path / "tree")
    for name in ("flat", "short rows"):
        assert losses(tmp_path / name) == pytest.approx(first, rel=1e-5)


def test_a_run_is_resumed_exactly(parts: Path, tmp_path: Path) -> None:
    run = {**TILES, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(arguments(parts, tmp_path / "whole", **run))
    train(arguments(parts, tmp_path / "cut", **run))
    for name in ("model.safetensors", "llava_origin.json"):
        (tmp_path / "cut" / name).unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    train(arguments(parts, tmp_path / "cut", **run))
    whole, again = saved(tmp_path / "whole"), saved(tmp_path / "cut")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_stage_two_starts_from_the_row_end_of_stage_one(parts: Path, tmp_path: Path) -> None:
    train(arguments(parts, tmp_path / "one", **TILES, tune_mm_mlp_adapter=True))
    learned = load_checkpoint(tmp_path / "one").model.model.image_newline
    frozen = {"freeze_mm_mlp_adapter": True, "pretrain_mm_mlp_adapter": tmp_path / "one"}
    train(arguments(parts, tmp_path / "two", **TILES, **frozen))
    assert torch.equal(load_checkpoint(tmp_path / "two").model.model.image_newline, learned)
    with pytest.raises(Exception, match=r"image_newline .* does not fit"):
        train(arguments(parts, tmp_path / "three", **KEPT, **frozen))


def test_a_checkpoint_is_trained_on_in_another_mode(parts: Path, tmp_path: Path) -> None:
    loaded = tiny_llava("linear")
    save_model(loaded.model, loaded.processor, tmp_path / "ours", origin=loaded.origin)
    ours = {"model_name_or_path": tmp_path / "ours", "vision_tower": None}
    train(arguments(parts, tmp_path / "run", **ours, **TILES))
    again = load_checkpoint(tmp_path / "run")
    assert again.processor.image_grid.merge == "spatial_unpad" and again.model.model.image_newline is not None


@pytest.mark.parametrize("mode", ["anyres", "keep"])
def test_what_does_not_go_together_is_refused(parts: Path, tmp_path: Path, mode: str) -> None:
    with pytest.raises(ConfigError, match="features of one size"):
        train(arguments(parts, tmp_path / "run", image_aspect_ratio=mode, feature_cache_dir=tmp_path / "cache"))
    with pytest.raises(ConfigError, match="multiple of 28 pixels"):
        train(arguments(parts, tmp_path / "run", image_aspect_ratio="anyres", image_grid_pinpoints="[[30, 28]]"))
    with pytest.raises(ConfigError, match="unknown mm_patch_merge_type 'pool'"):
        train(arguments(parts, tmp_path / "run", image_aspect_ratio=mode, mm_patch_merge_type="pool"))
    options = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"}
    with pytest.raises(ConfigError, match="5 tokens"):
        train(arguments(parts, tmp_path / "run", **options, mm_vision_select_feature="cls_patch"))


def test_a_projector_is_calibrated_on_tiles_only(parts: Path, tmp_path: Path) -> None:
    train(arguments(parts, tmp_path / "tiles", **TILES, calibrate_mm_projector=True, max_steps=1))
    with pytest.raises(ConfigError, match="images of one size"):
        train(arguments(parts, tmp_path / "kept", **KEPT, calibrate_mm_projector=True, max_steps=1))


def test_an_image_of_unsupported_shape_is_a_bad_row(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "images").mkdir()
    tiny_image(0).resize((900, 9)).save(tmp_path / "images" / "0.png")
    for number in (1, 2):
        tiny_image(number).save(tmp_path / "images" / f"{number}.png")
    run = {**KEPT, "image_folder": tmp_path / "images"}
    with pytest.raises(DataError, match="less than a patch"):
        train(arguments(parts, tmp_path / "run", **run))
    with caplog.at_level(logging.WARNING):
        train(arguments(parts, tmp_path / "run", **run, skip_bad=True, max_steps=1))
    assert "skipped 3 of 12 rows" in caplog.text


def test_rows_are_shown_and_questions_answered(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(arguments(parts, tmp_path / "run", **TILES, max_steps=1))
    data, images = str(parts / "vqa" / "train.json"), str(parts / "vqa" / "images")
    show_command.main([data, "--row", "1", "--model", str(tmp_path / "run"), "--image_folder", images])
    expected = load_checkpoint(tmp_path / "run").processor.image_grid.count((60, 28))
    assert f"{expected} of images" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"--image[-_]folder"):
        show_command.main([data, "--row", "1", "--model", str(tmp_path / "run")])
    image = str(parts / "vqa" / "images" / "1.png")
    chat(["--model", str(tmp_path / "run"), "--image", image, "--question", "What?", "--max-new-tokens", "2"])
