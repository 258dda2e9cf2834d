"""Damaged images: what remains of an image, draws by seed, epoch and row, and keys of their own."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.data.flat_batch import flatten
from llava.data.image_negatives import DAMAGES, LARGEST_CROP, ImageNegative, crop, damaged, split_key
from llava.data.preference import PreferenceDataset, read_preferences
from llava.errors import DataError
from llava.model.builder import LoadedModel
from tests.support.pairs import write_pairs

GRADIENT = Image.fromarray(np.arange(64, dtype=np.uint8)[None].repeat(48, 0)).convert("RGB")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_image_has_the_size_of_the_image_and_is_drawn_from_its_key(kind: str) -> None:
    first, again, other = (damaged(GRADIENT, kind, drawn) for drawn in ("a", "a", "b"))
    assert first.size == GRADIENT.size and first.tobytes() == again.tobytes() != GRADIENT.tobytes()
    assert (first.tobytes() == other.tobytes()) == (kind == "blank")


def test_a_crop_keeps_at_most_a_fifth() -> None:
    for seed in range(50):
        left, right = np.asarray(crop(GRADIENT, random.Random(seed)))[0, [0, -1], 0].astype(int)
        assert abs(right - left) <= 64 * LARGEST_CROP**0.5 + 2


def test_keys_name_seed_epoch_and_row() -> None:
    keys = {ImageNegative("noise", seed).key_of("ab", epoch, row) for seed, epoch, row in np.ndindex(2, 2, 2)}
    assert len(keys) == 8 and {split_key(key)[0] for key in keys} == {"ab"}
    assert ImageNegative("blank").key_of("ab", 0, 0) == ImageNegative("blank", 5).key_of("ab", 3, 1)
    assert split_key("ab") == ("ab", None)


def dataset_of(folder: Path, tiny: LoadedModel, kind: str, *, num_images: int = 3) -> PreferenceDataset:
    pairs = read_preferences(write_pairs(folder, 5, num_images=num_images))
    negative = ImageNegative(kind, seed=1)
    return PreferenceDataset(pairs, tiny.processor, image_folder=folder / "images", negative=negative)


@pytest.mark.parametrize("kind", ["crop", "swap"])
def test_the_third_sequence_is_the_chosen_answer_beside_another_image(
    tmp_path: Path, tiny: LoadedModel, kind: str
) -> None:
    dataset = dataset_of(tmp_path, tiny, kind)
    chosen, rejected, negative = dataset[0]
    assert negative.input_ids == chosen.input_ids and negative.labels == chosen.labels
    assert negative.images != chosen.images == rejected.images
    batch = flatten(dataset[0], dataset.images_for(dataset[0]), image_token_id=tiny.processor.image_token_id)
    assert batch.pixel_values is not None and len(batch.pixel_values) == 2
    assert dataset.in_epoch(0, 1)[:2] == (chosen, rejected) and dataset[0] == dataset.in_epoch(0, 0)
    drawn = {dataset.in_epoch(row, epoch)[2].images for row in range(4) for epoch in range(4)}
    assert len(drawn) == (16 if kind == "crop" else 3)
    if kind == "swap":
        own = {sequence.images for row in range(4) for sequence in dataset[row][:2]}
        assert drawn <= own


def test_text_only_pairs_compare_with_themselves(tmp_path: Path, tiny: LoadedModel) -> None:
    chosen, _, negative = dataset_of(tmp_path, tiny, "crop")[4]
    assert not chosen.images and negative == chosen


def test_nothing_to_swap_with(tmp_path: Path, tiny: LoadedModel) -> None:
    with pytest.raises(DataError, match=r"row 0, id '0': no other row has as many images"):
        _ = dataset_of(tmp_path, tiny, "swap", num_images=1)[0]
