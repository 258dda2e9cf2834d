"""Every recorded checkpoint gives the logits of the originals (oracles `*/forward.npz`).

Rows are compared one by one without padding, at the positions where the original's spliced mask is set: so a batch that
it padded on the left, or cut after splicing, needs no rule here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.fidelity.folder import Oracle, loaded_from
from benchmarks.fidelity.numbers import row_logits
from llava.model.checkpoint.load import load_checkpoint

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Recorded:
    """Checkpoint of an oracle, and the place of its numbers."""

    oracle: str
    folder: str
    prefix: str = ""
    batches: tuple[str, ...] = ()
    arrays: str = "forward.npz"
    base: str | None = None


RECORDED = (
    Recorded("llava-1.2.2", "out/stage2", batches=("batch_a", "batch_b", "left_pad", "truncated")),
    Recorded("llava-med-1.0", "out/stage2_v0", prefix="stage2_v0/", batches=("batch_a", "batch_b")),
    Recorded("llava-med-1.0", "out/stage2_v1", prefix="stage2_v1/", batches=("batch_a", "batch_b")),
    Recorded("llava-med-1.5-mistral", "llava-med-mistral-tiny", batches=("batch_a", "left_pad", "truncated")),
    Recorded("llava-rad", "out/stage2", batches=("batch_a", "batch_b", "same_length")),
    Recorded("stllava-med", "out/full", batches=("batch_a", "batch_b")),
)
ADAPTERS = (
    Recorded("llava-1.2.2", "out/llava-lora", arrays="lora_forward.npz", base="base_llm"),
    Recorded("llava-rad", "out/llavarad-lora", arrays="lora_forward.npz", base="base_llm"),
)
CASES = [(recorded, batch) for recorded in RECORDED for batch in recorded.batches]


def images_of(oracle: Path, row: str) -> list[Image.Image]:
    return Oracle(oracle).images(row)


def largest_difference(recorded: Recorded, batch: str, oracle: Path, *, ids_of: str | None = None) -> tuple[float, int]:
    """Return the largest difference to the recorded logits, and the number of compared positions."""
    loaded = loaded_from(oracle, recorded.folder, recorded.base)
    arrays = np.load(oracle / recorded.arrays)
    inputs = arrays if ids_of is None else np.load(oracle / ids_of)
    key = recorded.prefix + batch
    mask_in = inputs[f"{key}/in_attention_mask" if f"{key}/in_attention_mask" in inputs else f"{key}/attention_mask"]
    mask = inputs.get(f"{key}/spliced_mask", mask_in)
    stored = next(name for name in arrays if name.removeprefix(f"{key}/").startswith("logits_stride"))
    stride, expected = int(stored.rsplit("stride", 1)[1]), torch.from_numpy(arrays[stored])
    rows = json.loads((oracle / "forward_meta.json").read_text())[key]["ids"]
    worst, compared = 0.0, 0
    for number, row in enumerate(rows):
        images = images_of(oracle, row)
        ours = row_logits(loaded, inputs[f"{key}/input_ids"][number][mask_in[number]], loaded.processor.pixels(images))
        places = np.flatnonzero(mask[number])
        kept = [(index, place) for index, place in enumerate(places) if place % stride == 0]
        for index, place in kept:
            difference = ours[index, : expected.shape[-1]] - expected[number, place // stride]
            worst, compared = max(worst, float(difference.abs().max())), compared + 1
    return worst, compared


@pytest.mark.parametrize(("recorded", "batch"), CASES, ids=lambda case: getattr(case, "folder", case))
def test_logits(shared: Path, recorded: Recorded, batch: str) -> None:
    worst, compared = largest_difference(recorded, batch, shared / "oracles" / recorded.oracle)
    assert compared > 10
    assert worst < TOLERANCE


@pytest.mark.parametrize("recorded", ADAPTERS, ids=lambda case: case.folder)
def test_logits_with_an_adapter(shared: Path, recorded: Recorded) -> None:
    oracle = shared / "oracles" / recorded.oracle
    plain = np.load(oracle / recorded.arrays)
    loaded = loaded_from(oracle, recorded.folder, recorded.base)
    inputs, expected = np.load(oracle / "forward.npz"), torch.from_numpy(plain["logits_stride7"])
    rows = json.loads((oracle / "forward_meta.json").read_text())["batch_a"]["ids"]
    worst = 0.0
    for number, row in enumerate(rows):
        ids = inputs["batch_a/input_ids"][number][inputs["batch_a/in_attention_mask"][number]]
        ours = row_logits(loaded, ids, loaded.processor.pixels(images_of(oracle, row)))[::7, :-1]
        worst = max(worst, float((ours - expected[number, : len(ours)]).abs().max()))
    assert worst < TOLERANCE


@pytest.mark.parametrize("recorded", [RECORDED[3], RECORDED[5]], ids=lambda case: case.folder)
def test_tower_and_projector(shared: Path, recorded: Recorded) -> None:
    """Features of tower and projector agree for every image (text-only rows have a dummy image)."""
    oracle = shared / "oracles" / recorded.oracle
    loaded = loaded_from(oracle, recorded.folder)
    arrays, rows = np.load(oracle / "forward.npz"), json.loads((oracle / "forward_meta.json").read_text())
    compared = 0
    for number, row in enumerate(rows["batch_a"]["ids"]):
        if images := images_of(oracle, row):
            with torch.no_grad():
                features = loaded.model.tower_features(loaded.processor.pixels(images))
                output: Any = loaded.model.model.get_image_features(features).pooler_output
            for ours, name in ((features[0], "tower_features"), (output[0], "projected")):
                assert (ours - torch.from_numpy(arrays[f"batch_a/{name}"][number])).abs().max() < TOLERANCE
            compared += 1
    assert compared == 3


@pytest.mark.parametrize(
    ("oracle", "folder"),
    [("llava-1.2.2", "out/stage1"), ("llava-rad", "out/stage1"), ("llava-1.2.2", "out/stage1/checkpoint-3")],
)
def test_projector_alone(shared: Path, oracle: str, folder: str) -> None:
    """The model has the projector that was trained alone; everything else is the base's."""
    path = shared / "oracles" / oracle
    loaded = loaded_from(path, folder, "base_llm")
    saved = torch.load(path / folder / "mm_projector.bin", weights_only=True)
    state = loaded.model.state_dict()
    for name, tensor in saved.items():
        assert torch.equal(state[name.replace("model.mm_projector.", "model.multi_modal_projector.")], tensor)
    assert loaded.processor.template.name == "plain"


def test_both_adapters_of_stllava(shared: Path) -> None:
    """The language model's adapter changes weights, the tower's cannot (its B is zero, as published)."""
    path = shared / "oracles" / "stllava-med"
    merged = loaded_from(path, "out/llava-lora", "base_llm")
    parts = {"vision_tower": str(path / "vision_tower"), "base": str(path / "base_llm")}
    kept = load_checkpoint(path / "out" / "llava-lora", merge=False, dtype=torch.float32, **parts)
    ids, pixels = np.arange(3, 40), torch.zeros(0, 3, 56, 56)
    torch.testing.assert_close(row_logits(kept, ids, pixels), row_logits(merged, ids, pixels), rtol=0, atol=TOLERANCE)
    assert any(".vision_tower." in name and "lora_A" in name for name, _ in kept.model.named_parameters())
    tower = torch.load(path / "vision_tower" / "pytorch_model.bin", weights_only=True)
    name = "encoder.layers.1.mlp.fc1.weight"
    ours = merged.model.state_dict()[f"model.vision_tower.{name}"]
    assert torch.equal(ours, tower[f"vision_model.{name}"].float())
