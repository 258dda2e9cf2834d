"""A calibrated projector: outputs as long as word embeddings, around their mean, for features of any scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava.errors import ConfigError
from llava.model import calibration
from tests.support.tiny import tiny_llava


@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_have_the_scale_of_words_and_differ_by_image(layers: int) -> None:
    torch.manual_seed(0)
    projector = nn.Linear(12, 32) if layers == 1 else nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 32))
    features = torch.randn(20, 5, 12) * torch.logspace(-2, 2, 12) + 100.0
    words = torch.randn(50, 32) * 0.3 + 0.1
    calibration.fit_projector(projector, features, words)
    outputs = projector(features).flatten(0, 1)
    center = outputs.mean(dim=0)
    torch.testing.assert_close(center, words.mean(dim=0), rtol=0, atol=1e-3)
    assert (outputs - center).norm(dim=1).mean().item() == pytest.approx(words.norm(dim=1).mean().item(), rel=1e-3)
    # Channels of small scale matter as much as those of large scale.
    changed = features.clone()
    changed[..., 0] += 0.02
    assert (projector(changed) - projector(features)).norm(dim=-1).min() > 0.1


def test_a_projector_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear"):
        calibration.fit_projector(nn.Identity(), torch.zeros(1, 1, 4), torch.zeros(2, 4))


def test_a_model_gets_the_same_projector_from_the_same_seed() -> None:
    pixels = torch.rand(calibration.BATCH_SIZE + 1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    weights = []
    for seed in (0, 0, 1):
        loaded = tiny_llava()
        before = torch.random.get_rng_state()
        calibration.calibrate_projector(loaded.model, pixels, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        weights.append(loaded.model.model.multi_modal_projector[0].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
