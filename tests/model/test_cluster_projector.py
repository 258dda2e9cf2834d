"""The cluster projector: published values, the formula in explicit loops, names, settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.fidelity.gradient_terms import gradient_terms
from benchmarks.fidelity.images import GRADIENT_TOLERANCE, PIXEL_TOLERANCE
from benchmarks.fidelity.ties import SwappedProjector, closest
from llava.errors import ConfigError
from llava.model.builder import build_model
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.legacy.config import projector_settings
from llava.model.checkpoint.load_parts import load_projector
from llava.model.checkpoint.save import projector_state, save_projector
from llava.model.multimodal_projector import ClusterProjector, cluster_projector
from tests.support.tiny import tiny_llava, write_tiny_lm, write_tiny_tower

PUBLISHED_NAMES = (
    "sim_alpha",
    "sim_beta",
    *(f"{layer}.{kind}" for layer in ("c", "v", "f", "ln_1", "mlp.0", "mlp.2") for kind in ("weight", "bias")),
)
"""The whole state, under the names of published files; `ln_1` is in every file, but unused."""


def random_projector(seed: int, **settings: Any) -> ClusterProjector:
    """Return a projector of six channels to eight, every weight far from its initial value."""
    torch.manual_seed(seed)
    projector = ClusterProjector(6, 8, **{"num_centers": 3, **settings})
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return projector


def slow(projector: ClusterProjector, features: Tensor) -> Tensor:
    """Project one image [P, Dv] by STLLaVA-Med's formula, one number at a time."""
    num, (length, width) = projector.num_centers, features.shape
    keys, values = projector.v(features), projector.f(features)
    norms = [max(math.sqrt(sum(float(keys[p, d]) ** 2 for p in range(length))), 1e-12) for d in range(width)]
    keys = torch.stack([torch.stack([keys[p, d] / norms[d] for d in range(width)]) for p in range(length)])

    def pooled(tokens: Tensor) -> list[Tensor]:
        windows = [(i * length // num, -(-(i + 1) * length // num)) for i in range(num)]
        return [tokens[start:stop].mean(dim=0) for start, stop in windows]

    centers, center_values = pooled(features), pooled(values)
    for _ in range(projector.num_iters):
        moved = [projector.c(center) for center in centers]
        updated = [torch.zeros(width) for _ in range(num)]
        for p in range(length):
            scores = [math.exp(float(m @ keys[p]) / float(m.norm())) for m in moved]
            for n in range(num):
                updated[n] = updated[n] + scores[n] / sum(scores) * values[p]
        centers = updated
    owner, weight = [], []
    for p in range(length):
        cosines = [float(c @ features[p]) / float(c.norm() * features[p].norm()) for c in centers]
        similar = [1 / (1 + math.exp(-float(projector.sim_beta) - float(projector.sim_alpha) * x)) for x in cosines]
        owner.append(max(range(num), key=lambda n: similar[n]))
        weight.append(similar[owner[-1]])
    rows = []
    for p in range(length):
        mine = [q for q in range(length) if owner[q] == owner[p]]
        total = center_values[owner[p]] + torch.stack([weight[q] * values[q] for q in mine]).sum(dim=0)
        rows.append(projector.mlp(features[p] + weight[p] * total / (len(mine) + 1)))
    return torch.stack(rows)


@pytest.mark.parametrize(("num_centers", "num_iters", "length"), [(3, 2, 7), (3, 1, 9), (1, 2, 4), (5, 0, 7)])
def test_equals_the_formula_in_loops(num_centers: int, num_iters: int, length: int) -> None:
    projector = random_projector(length, num_centers=num_centers, num_iters=num_iters)
    features = torch.randn(2, length, 6)
    with torch.no_grad():
        expected = torch.stack([slow(projector, image) for image in features])
        torch.testing.assert_close(projector(features), expected, rtol=0, atol=2e-5)


def test_golden_values() -> None:
    projector = ClusterProjector(4, 6, num_centers=2, num_iters=2)
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            if not name.startswith(("sim_", "ln_")):
                count = parameter.numel()
                parameter.copy_((torch.arange(count) / count - 0.5).reshape(parameter.shape))
        out = projector(torch.sin(torch.arange(16) / 10).reshape(1, 4, 4))
    first = torch.tensor([-0.58372, -0.363841, -0.143963, 0.075915, 0.295794, 0.515672])
    last = torch.tensor([-1.407149, -0.821679, -0.23621, 0.34926, 0.93473, 1.520199])
    torch.testing.assert_close(out[0, 0], first, rtol=0, atol=1e-6)
    torch.testing.assert_close(out[0, 3], last, rtol=0, atol=1e-6)
    assert float(out.detach().sum()) == pytest.approx(0.430013, abs=2e-6)


@pytest.mark.parametrize("name", ["small", "wide", "l576"])
def test_values_and_gradients_of_the_original(shared: Path, name: str) -> None:
    arrays = np.load(shared / "oracles" / "stllava-med" / "cluster_projector.npz")
    vision, text, num_centers, num_iters, _, _ = arrays[f"{name}/cfg"].tolist()
    projector = ClusterProjector(vision, text, num_centers=num_centers, num_iters=num_iters)
    prefix = f"{name}/w/"
    weights = {
        key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith(prefix)
    }
    assert set(weights) == set(PUBLISHED_NAMES)
    projector.load_state_dict(weights)
    features, recorded_out = (torch.from_numpy(arrays[f"{name}/{key}"]) for key in ("x", "out"))
    projector = closest(projector, features, recorded_out)
    with gradient_terms(projector) as terms:
        out = projector(features)
        (out**2).sum().backward()
    torch.testing.assert_close(out, recorded_out, rtol=0, atol=PIXEL_TOLERANCE)
    for key, parameter in projector.named_parameters():
        if f"{name}/grad_none/{key}" in arrays.files:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            recorded = float(arrays[f"{name}/grad_norm/{key}"])
            size = float(terms[key].norm()) if key in terms else recorded
            assert float(parameter.grad.norm()) == pytest.approx(recorded, rel=0, abs=GRADIENT_TOLERANCE * size), key


def test_terms_of_a_gradient_are_summed_without_their_signs() -> None:
    layer = torch.nn.Linear(2, 1)
    inputs = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
    with gradient_terms(torch.nn.Sequential(layer)) as terms:
        (layer(inputs) * torch.tensor([[2.0], [-1.0]])).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None
    assert layer.weight.grad.tolist() == [[5.0, 3.0]] and terms["0.weight"].tolist() == [[5.0, 5.0]]
    assert layer.bias.grad.tolist() == [1.0] and terms["0.bias"].tolist() == [3.0]
    terms.clear()
    layer(inputs).sum().backward()
    assert not terms  # outside nothing is collected


def test_equal_centers_are_one() -> None:
    """Rounding may make any of equal centers the most similar one; patches join the first of them."""
    projector = random_projector(2, num_centers=8)
    assert projector.first_equal(4, torch.device("cpu")).tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert projector.first_equal(8, torch.device("cpu")).tolist() == list(range(8))
    assert projector.first_equal(20, torch.device("cpu")).tolist() == list(range(8))
    similarity = torch.full((1, 8, 2), 0.5)
    similarity[0, 3, 0] = similarity[0, 2, 1] = 0.6
    assert projector.owners(torch.cat([similarity] * 2, dim=2)).tolist() == [[2, 2, 2, 2]]


def test_a_swapped_tie_is_found() -> None:
    projector = random_projector(3, num_centers=2)
    features = torch.randn(1, 7, 6)
    with torch.no_grad():
        projector.sim_alpha.fill_(0.0)  # every similarity is equal, so every patch is tied
        first = projector(features)
        swapped = SwappedProjector(6, 8, num_centers=2)
        swapped.load_state_dict(projector.state_dict())
        swapped.swapped = ((0, 3), (0, 5))
        recorded = swapped(features)
        assert not torch.allclose(first, recorded, atol=1e-3)
        torch.testing.assert_close(closest(projector, features, recorded)(features), recorded)


def test_images_are_independent() -> None:
    projector = random_projector(0)
    features = torch.randn(3, 7, 6)
    with torch.no_grad():
        alone = torch.cat([projector(image[None]) for image in features])
        torch.testing.assert_close(projector(features), alone, rtol=0, atol=1e-6)
        assert projector(features[:0]).shape == (0, 7, 8)


def test_half_precision_keeps_its_type() -> None:
    # One center: with several, rounding may assign a patch to another one.
    projector = random_projector(1, num_centers=1).to(torch.bfloat16)
    features = torch.randn(1, 9, 6)
    out = projector(features.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    exact = projector.float()(features.to(torch.bfloat16).float())
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_settings_for_new_models() -> None:
    features = torch.randn(1, 9, 6)
    published = random_projector(2)
    channel = random_projector(2, norm="channel")
    soft = random_projector(2, temperature=0.05)
    soft.load_state_dict(published.state_dict() | {"temperature": torch.full((1, 1, 1), 0.05)})
    with torch.no_grad():
        assert not torch.allclose(published(features), channel(features))
        assert not torch.allclose(published(features), soft(features))
    soft(features).sum().backward()
    assert soft.temperature is not None
    assert soft.temperature.grad is not None
    assert float(soft.temperature.grad.abs()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": 4}, "unknown settings .*num_clusters.*known"),
        ({"num_centers": 0}, "num_centers=0"),
        ({"norm": "patch"}, "unknown norm"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster_projector(4, 4, settings)


@pytest.mark.parametrize(
    ("keys", "numbers"), [({}, (256, 2)), ({"mm_cluster_num_centers": 4, "mm_cluster_iters": 1}, (4, 1))]
)
def test_settings_of_a_published_configuration(tmp_path: Path, keys: dict[str, int], numbers: tuple[int, int]) -> None:
    checkpoint = Checkpoint(tmp_path, "legacy", config={"mm_projector_type": "cluster", "mm_hidden_size": 6, **keys})
    kind, settings = projector_settings(checkpoint)
    projector = cluster_projector(6, 8, settings)
    assert kind == "cluster" and (projector.num_centers, projector.num_iters) == numbers


def test_the_model_remembers_type_and_settings(tmp_path: Path) -> None:
    settings = {"num_centers": 3, "num_iters": 1}
    loaded = tiny_llava("cluster", projector_kwargs=settings)
    projector = loaded.model.model.multi_modal_projector
    assert isinstance(projector, ClusterProjector)
    assert (projector.num_centers, projector.num_iters) == (3, 1)
    with torch.no_grad():
        projector.sim_beta.fill_(-0.3)  # loaders that rename an old `beta` lost this name
    loaded.model.save_pretrained(tmp_path)
    again = type(loaded.model).from_pretrained(tmp_path)
    assert again.config.projector_kwargs == settings
    for name, tensor in projector.state_dict().items():
        assert torch.equal(again.model.multi_modal_projector.state_dict()[name], tensor), name


def test_projector_files_hold_the_published_names(tmp_path: Path) -> None:
    lm, tower = write_tiny_lm(tmp_path / "lm"), write_tiny_tower(tmp_path / "tower")
    one = build_model(str(lm), str(tower), projector_type="cluster", seed=1)
    other = build_model(str(lm), str(tower), projector_type="cluster", seed=2)
    assert set(projector_state(one.model)) == {f"model.mm_projector.{name}" for name in PUBLISHED_NAMES}
    save_projector(one.model, one.processor, tmp_path / "out")
    load_projector(other.model, tmp_path / "out" / "mm_projector.bin")
    pixels = torch.rand(1, 3, 28, 28)
    for model in (one.model, other.model):
        model.eval()
    with torch.no_grad():
        features = [model.get_image_features(pixels).pooler_output[0] for model in (one.model, other.model)]
    assert torch.equal(*features)
