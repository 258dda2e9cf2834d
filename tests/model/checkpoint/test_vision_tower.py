"""Places of a tower: given, inside, named (from the working directory, then the checkpoint), or known by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from llava.errors import CheckpointError
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.vision_tower import PUBLISHED_TOWERS, find_tower
from llava.model.multimodal_encoder.towers import input_size
from tests.support.legacy_folders import write_legacy
from tests.support.model_tools import logits
from tests.support.tiny import write_tiny_tower


def test_a_published_tower_inside_needs_no_download(tmp_path: Path) -> None:
    """Its settings and its preprocessing are known by the name in the checkpoint."""
    checkpoint = Checkpoint.open(write_legacy(tmp_path, mm_vision_tower="openai/clip-vit-large-patch14-336"))
    source = find_tower(checkpoint)
    config = source.config()
    assert (config.hidden_size, config.image_size, config.hidden_act) == (1024, 336, "quick_gelu")
    processor = source.image_processor(config, checkpoint.folder)
    assert input_size(processor) == 336
    pixels = processor(images=[Image.new("RGB", (400, 300))], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 336, 336)
    assert set(PUBLISHED_TOWERS) == {"openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336"}


def test_a_tower_inside_is_used_and_not_the_one_it_names(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path)
    expected = logits(load_checkpoint(folder))
    other = write_tiny_tower(tmp_path / "other", seed=99)
    assert logits(load_checkpoint(folder, vision_tower=str(other))).equal(expected)
    (tmp_path / "b").mkdir()
    beside = write_legacy(tmp_path / "b", tower_inside=False)
    assert logits(load_checkpoint(beside)).equal(expected)
    assert not logits(load_checkpoint(beside, vision_tower=str(other))).equal(expected)


def test_relative_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_legacy(tmp_path, tower_inside=False, mm_vision_tower="tower")
    with pytest.raises(CheckpointError, match="--vision-tower"):
        load_checkpoint(folder)
    monkeypatch.chdir(tmp_path)
    expected = logits(load_checkpoint(folder))
    monkeypatch.chdir("/")
    (tmp_path / "tower").rename(folder / "tower")
    assert logits(load_checkpoint(folder)).equal(expected)


def test_no_tower_named(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path, tower_inside=False, mm_vision_tower=None)
    with pytest.raises(CheckpointError, match="names no vision tower"):
        load_checkpoint(folder)
