"""Dataset for supervised fine-tuning: lazy, picklable, images by key, lengths for the samplers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava.data.dataset import SFTDataset
from llava.data.feature_cache import build_feature_cache
from llava.data.samplers import ImageGroupedSampler
from llava.errors import DataError
from llava.samples import Conversation, Origin, Sample, Turn


def row(question: str, answer: str, *images: str, number: int = 0) -> Sample:
    turns = (Turn("human", question), Turn("gpt", answer))
    return Sample(f"s{number}", Conversation(turns), images, origin=Origin("train.json", number))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        Image.new("RGB", (20 + number, 30), (60 * number, 10, 200)).save(tmp_path / f"{number}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    return tmp_path


ROWS = [
    row("<image>\nwhat is it?", "a cell", "0.png"),
    row("is it red?", "no", "copy.png", number=1),
    row("who are you?", "a model", number=2),
    row("<image>\n<image>\nwhich is larger?", "the second one", "1.png", "2.png", number=3),
]


def test_rows_become_sequences_with_image_keys(tiny: Any, folder: Path) -> None:
    data = SFTDataset(ROWS, tiny.processor, image_folder=folder)
    first, second, text, two = (data[number] for number in range(len(data)))
    assert first.images == second.images
    assert text.images == () and len(set(two.images)) == 2
    patch = tiny.processor.image_token_id
    assert [encoded.input_ids.count(patch) for encoded in (first, second, text, two)] == [
        number * tiny.processor.num_image_tokens for number in (1, 1, 0, 2)
    ]
    for encoded in (first, second, text, two):
        assert any(label != -100 for label in encoded.labels)
    # The second row marks no place for its image: it is put in front, so both rows begin alike.
    start, stop = first.image_spans[0]
    assert second.image_spans[0] == (start, stop)
    assert first.input_ids[:stop] == second.input_ids[:stop]


def test_images_for_holds_each_distinct_image_once(tiny: Any, folder: Path) -> None:
    data = SFTDataset(ROWS, tiny.processor, image_folder=folder)
    sequences = [data[number] for number in (1, 3, 0, 2)]
    found = data.images_for(sequences)
    assert list(found) == [*sequences[0].images, *sequences[1].images]
    with Image.open(folder / "0.png") as image:
        assert torch.equal(found[sequences[0].images[0]], tiny.processor.pixels([image])[0])
    assert data.images_for([sequences[3]]) == {}


def test_lengths_count_words_and_image_tokens(tiny: Any, folder: Path) -> None:
    data = SFTDataset(ROWS, tiny.processor, image_folder=folder)
    num = tiny.processor.num_image_tokens
    assert data.lengths() == [6 + num, 4 + num, 5, 8 + 2 * num]
    assert data.modality_lengths() == [6 + num, 4 + num, -5, 8 + 2 * num]
    assert data.image_groups() == [("0.png",), ("copy.png",), None, ("1.png", "2.png")]
    assert len(data.image_keys()) == 3


def test_shortened_rows_are_counted_and_reported_once(
    tiny: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = SFTDataset(ROWS, tiny.processor, image_folder=folder)
    limit = len(whole[0].input_ids) - 2
    data = SFTDataset([ROWS[0], ROWS[0]], tiny.processor, image_folder=folder, max_length=limit)
    for number in (0, 1, 0):
        encoded = data[number]
        assert (len(encoded.input_ids), encoded.num_cut) == (limit, 2)
    assert data.shortened == {0: 2, 1: 2}
    assert caplog.text.count(f"rows longer than {limit} tokens") == 1


def test_a_bad_row_is_named(tiny: Any, folder: Path) -> None:
    rows = [row("q", "a", "gone.png", number=7), row("<image>\nq", "a", number=8)]
    data = SFTDataset(rows, tiny.processor, image_folder=folder)
    with pytest.raises(DataError, match=r"train\.json, row 7, id 's7': .*gone\.png"):
        data[0]
    with pytest.raises(DataError, match=r"train\.json, row 8, id 's8': .*names no image"):
        data[1]


def test_nothing_is_opened_before_it_is_asked_for(tiny: Any, tmp_path: Path) -> None:
    data = SFTDataset(ROWS, tiny.processor, image_folder=tmp_path / "nowhere")
    assert len(data) == 4
    assert data[2].images == ()


def test_cached_features_come_instead_of_pixels(tiny: Any, folder: Path, tmp_path: Path) -> None:
    data = SFTDataset(ROWS, tiny.processor, image_folder=folder)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(2).mean(dim=2, keepdim=True)

    cache = build_feature_cache(tmp_path / "c", data.image_keys(), tower="t", pixels=data.pixels, features=features)
    sequence = data[0]
    pixels = data.images_for([sequence])[sequence.images[0]]
    cached = data.with_features(cache)
    assert torch.equal(cached.images_for([sequence])[sequence.images[0]], features(pixels[None])[0])
    for plain in (data, cached.with_features(None)):
        assert torch.equal(plain.images_for([sequence])[sequence.images[0]], pixels)


def test_pickled_and_read_by_worker_processes(tiny: Any, folder: Path) -> None:
    data = SFTDataset(ROWS, tiny.processor, image_folder=folder)
    other = pickle.loads(pickle.dumps(data))
    assert [other[number] for number in range(4)] == [data[number] for number in range(4)]
    sampler = ImageGroupedSampler(data.image_groups(), 2, questions_per_image=2)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=list, num_workers=1)
    found = [encoded for step in loader for encoded in step]
    assert sorted(found, key=str) == sorted((data[number] for number in range(4)), key=str)
