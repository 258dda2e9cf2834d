"""Batches on which the originals are wrong, or whose record names rows oddly, are explained; changed ones are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.fidelity.folder import Line, Oracle
from benchmarks.fidelity.forward import forward
from benchmarks.fidelity.images import cluster_projector
from benchmarks.fidelity.numbers import expanded, loss_of, row_output
from llava.compat import COMPAT
from llava.model.multimodal_projector import ClusterProjector

ALL = frozenset(COMPAT)
STRIDE = 5


def rows_of(oracle: Oracle, key: str, order: list[int]) -> dict[str, np.ndarray]:
    """Return the collated arrays of some rows of a recorded batch of LLaVA-Med 1.0."""
    arrays = oracle.arrays("forward.npz")
    return {name: arrays[f"{key}/{name}"][order] for name in ("input_ids", "labels", "attention_mask")}


def recorded_batch(oracle: Oracle, order: list[int], *, shifted: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return arrays and description of rows of `stage2_v1/batch_a`.

    With `shifted`, the list of images has zeros for a row of text, and only rows with an image move on in it.
    """
    names = [oracle.json("forward_meta.json")["stage2_v1/batch_a"]["ids"][row] for row in order]
    loaded = oracle.loaded(oracle.model("stage2_v1"))
    batch = rows_of(oracle, "stage2_v1/batch_a", order)
    logits, pairs = [], []
    images_of = [loaded.processor.pixels(oracle.images(name)) for name in names]
    listed = [images if len(images) else torch.zeros(1, 3, *loaded.processor.image_size) for images in images_of]
    for number in range(len(names)):
        length = int(batch["attention_mask"][number].sum())
        ids = expanded(loaded.processor, batch["input_ids"][number][:length], ())
        images = images_of[number]
        if len(images) and shifted:
            images = listed.pop(0)
        given = {"pixel_values": images} if len(images) else {}
        with torch.no_grad():
            scores = row_output(loaded, ids, given).logits[0, :, :643]
        pairs.append((scores, batch["labels"][number][:length].tolist()))
        padded = np.zeros((batch["input_ids"].shape[1], scores.shape[1]), dtype=np.float32)
        padded[:length] = scores.numpy()
        logits.append(padded[::STRIDE])
    batch[f"logits_stride{STRIDE}"] = np.stack(logits)
    arrays = {f"stage2_v1/odd/{name}": value for name, value in batch.items()}
    return arrays, {"ids": names, "loss": float(loss_of(pairs, 643)), "template": "vicuna_v1_1"}


def lines(
    shared: Path, arrays: dict[str, Any], meta: dict[str, Any], compat: frozenset[str], **other: Any
) -> list[Line]:
    contents = {"forward.npz": arrays, "forward_meta.json": {"stage2_v1/odd": meta}, **other}
    return list(forward(Oracle(shared / "oracles" / "llava-med-1.0", compat, contents)))


def failed(found: list[Line]) -> list[str]:
    return [line.quantity for line in found if line.status != "ok"]


@pytest.fixture
def oracle(shared: Path) -> Oracle:
    return Oracle(shared / "oracles" / "llava-med-1.0")


@pytest.mark.parametrize("order", [[2, 0], [2, 1], [0, 2, 1], [1, 2, 0], [2, 0, 1]])
def test_an_image_after_a_text_only_row_becomes_zeros(shared: Path, oracle: Oracle, order: list[int]) -> None:
    arrays, meta = recorded_batch(oracle, order, shifted=True)
    found = lines(shared, arrays, meta, ALL)
    assert not failed(found) and any("shifted_images" in line.note for line in found), found
    assert failed(lines(shared, arrays, meta, ALL - {"shifted_images"})) == [
        "logits stage2_v1/odd",
        "loss stage2_v1/odd",
    ]
    arrays[f"stage2_v1/odd/logits_stride{STRIDE}"][-1, 3, 7] += 0.01
    assert "logits stage2_v1/odd" in failed(lines(shared, arrays, meta, ALL))


@pytest.mark.parametrize("names", [["text_only"], "text_only", []])
def test_rows_that_the_record_does_not_name_are_found_by_their_text(shared: Path, oracle: Oracle, names: Any) -> None:
    arrays, meta = recorded_batch(oracle, [2, 0], shifted=False)
    found = lines(shared, arrays, {**meta, "ids": names}, ALL - {"shifted_images"})
    assert not failed(found), found
    arrays[f"stage2_v1/odd/logits_stride{STRIDE}"][1, 3, 7] += 0.01
    assert "logits stage2_v1/odd" in failed(lines(shared, arrays, {**meta, "ids": names}, ALL))


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0, 2], [2, 1], [0, 1, 2]])
def test_two_rows_of_one_name_are_told_apart_by_their_text(shared: Path, oracle: Oracle, order: list[int]) -> None:
    arrays, meta = recorded_batch(oracle, order, shifted=False)
    rows = [{**row, "id": "same" if row["id"] in meta["ids"] else row["id"]} for row in oracle.json("data.json")]
    found = lines(
        shared, arrays, {**meta, "ids": ["same"] * len(order)}, ALL - {"shifted_images"}, **{"data.json": rows}
    )
    assert not failed(found), found


@pytest.mark.parametrize(
    ("num_iters", "num_rows", "num_patches"), [(2, 2, 16), (1, 2, 16), (3, 1, 16), (2, 1, 4), (2, 3, 9)]
)
def test_one_cluster_center_has_gradients_of_zero(
    shared: Path, num_iters: int, num_rows: int, num_patches: int
) -> None:
    torch.manual_seed(0)
    projector = ClusterProjector(8, 12, num_centers=1, num_iters=num_iters)
    given = torch.randn(num_rows, num_patches, 8)
    output = projector(given)
    (output**2).sum().backward()
    arrays: dict[str, Any] = {f"one/w/{name}": p.detach().numpy() for name, p in projector.named_parameters()}
    norms = {name: p.grad for name, p in projector.named_parameters()}
    arrays |= {f"one/grad_norm/{name}": np.array(float(g.norm())) for name, g in norms.items() if g is not None}
    arrays |= {f"one/grad_none/{name}": np.array(1) for name, g in norms.items() if g is None}
    arrays |= {
        "one/x": given.numpy(),
        "one/out": output.detach().numpy(),
        "one/cfg": np.array([8, 12, 1, num_iters, num_patches, num_rows]),
    }
    zero = [name for name, value in arrays.items() if "grad_norm" in name and value == 0]
    assert zero, "the weights before the assignment get no gradient"
    folder = shared / "oracles" / "stllava-med"
    assert [line.status for line in cluster_projector(Oracle(folder, ALL, {"cluster_projector.npz": arrays}))] == [
        "ok",
        "ok",
    ]
    for name, value in ((zero[0], 1.0), (zero[0], np.nan), ("one/grad_norm/mlp.0.weight", 0.0)):
        changed = {**arrays, name: np.array(value)}
        found = list(cluster_projector(Oracle(folder, ALL, {"cluster_projector.npz": changed})))
        assert [line.status for line in found] == ["ok", "FAIL"], name
