"""Data file to model: pixels and cached tower features give the same predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava.data.dataset import SFTDataset
from llava.data.feature_cache import build_feature_cache, weights_hash
from llava.data.flat_batch import flatten, target_logits
from llava.data.image_store import ImageIndex
from llava.data.records import load_samples
from llava.data.samplers import ImageGroupedSampler
from llava.data.validate import check_trainable
from tests.support.tiny import write_tiny_vqa


def test_cached_features_change_no_prediction(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "vqa"
    write_tiny_vqa(folder, num_images=4, questions_per_image=3)
    samples = load_samples(folder / "train.json")
    index = ImageIndex(folder / "images")
    checked = check_trainable(samples, folder / "images", tiny.processor, index=index)
    assert (len(checked.samples), checked.num_images) == (12, 4)
    data = SFTDataset(checked.samples, tiny.processor, image_folder=folder / "images", index=index)
    tower = weights_hash(tiny.model.model.vision_tower.state_dict(), {"layer": -2})
    cache = build_feature_cache(
        tmp_path / "cache", data.image_keys(), tower=tower, pixels=data.pixels, features=tiny.model.tower_features
    )
    assert len(cache) == 4
    tiny.model.eval()
    for rows in ImageGroupedSampler(data.image_groups(), 6, questions_per_image=3):
        sequences = [data[row] for row in rows]
        found = []
        for features in (None, cache):
            images = data.with_features(features).images_for(sequences)
            batch = flatten(sequences, images, image_token_id=tiny.processor.image_token_id)
            assert batch.pixel_values is not None
            assert batch.pixel_values.shape[0] == 2
            with torch.no_grad():
                found.append(target_logits(tiny.model, batch))
        assert torch.allclose(*found, rtol=0, atol=1e-5)
