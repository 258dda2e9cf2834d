"""Log-probabilities of sequences against those that the original recorded, and against padded rows."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.data.flat_batch import Layout, flatten
from llava.data.preference import PreferenceDataset, read_preferences
from llava.model.builder import LoadedModel
from llava.model.checkpoint.load import load_checkpoint
from llava.train.reference import sequence_logprobs, sequence_tokens
from tests.support.trees import IMAGE, num_trained, random_images, random_sequences


@pytest.mark.parametrize("layout", ["tree", "flat", "padded"])
@torch.no_grad()
def test_log_probabilities_are_the_recorded_ones(shared: Path, layout: Layout) -> None:
    folder = shared / "oracles" / "stllava-med"
    loaded = load_checkpoint(
        folder / "out/dpo_policy",
        base=str(folder / "base_llm"),
        vision_tower=str(folder / "vision_tower"),
        template="v1",
    )
    pairs = read_preferences(folder / "dpo.json")
    dataset = PreferenceDataset(pairs, loaded.processor, image_folder=folder / "images", max_length=640)
    sequences = [sequence for row in range(len(dataset)) for sequence in dataset[row]]
    token = loaded.processor.image_token_id
    batch = flatten(sequences, dataset.images_for(sequences), image_token_id=token, layout=layout)
    found = sequence_logprobs(loaded.model, batch, without=token).view(-1, 2)
    recorded = np.load(folder / "dpo.npz")
    for side, name in enumerate(("policy_chosen_logps", "policy_rejected_logps")):
        # The recorded sums are float32 numbers up to 512, which are 3.05e-5 apart: two steps.
        torch.testing.assert_close(found[:, side].float(), torch.from_numpy(recorded[name]), rtol=0, atol=6.2e-5)


@torch.no_grad()
def test_a_tree_has_the_log_probabilities_of_padded_rows(tiny: LoadedModel) -> None:
    sequences = random_sequences(random.Random(5), 8)
    images = random_images()
    model = tiny.model.double()
    wide = {key: pixels.double() for key, pixels in images.items()}
    found = [
        sequence_logprobs(model, flatten(sequences, wide, image_token_id=IMAGE, layout=layout), without=IMAGE)
        for layout in ("tree", "padded")
    ]
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_tokens_of_each_sequence() -> None:
    sequences = random_sequences(random.Random(6), 8)
    batch = flatten(sequences, random_images(), image_token_id=IMAGE)
    assert sequence_tokens(batch).tolist() == [float(num_trained([sequence])) for sequence in sequences]
