"""Checks of recorded forward and backward passes: layout, embeddings, logits, loss, gradients.

Rows are computed one by one without padding and compared where the original's spliced mask is set, so batches that it
padded on the left or cut after splicing need no special case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.fidelity.folder import IMAGE_MARK, Differences, Line, Oracle, loaded_from, within
from benchmarks.fidelity.recorded_weights import current_name
from llava.constants import IGNORE_INDEX
from llava.data.flat_batch import batch_images
from llava.model.builder import LoadedModel
from llava.model.lora import freeze_for
from llava.processing import LlavaMedProcessor

LOGIT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-4
"""Relative tolerance of gradient norms."""


@dataclass(frozen=True)
class Row:
    """Recorded row as input of our model.

    Attributes:
        ids: token ids with our placeholders for images.
        labels: labels of `ids`.
        images: model inputs of its images, by keyword of the model.
        places: its positions in the recorded batch; shorter than `ids` if the original cut the row.
    """

    ids: list[int]
    labels: list[int]
    images: dict[str, Tensor]
    places: np.ndarray


def row_output(loaded: LoadedModel, ids: list[int], images: dict[str, Tensor]) -> Any:
    """Return the output of one unpadded row."""
    return loaded.model(input_ids=torch.tensor([ids]), **images)


def expanded(processor: LlavaMedProcessor, ids: Any, counts: Sequence[int]) -> list[int]:
    """Return recorded ids with `counts` of our placeholders for each image."""
    waiting, token = iter(counts), processor.image_token_id
    return [each for i in ids for each in ([token] * next(waiting) if i == IMAGE_MARK else [int(i)])]


def row_logits(loaded: LoadedModel, ids: Any, pixels: Tensor) -> Tensor:
    """Return the logits [T, V] of one row of recorded ids with images [N, 3, H, W] of one size."""
    processor = loaded.processor
    images = {"pixel_values": pixels} if len(pixels) and (IMAGE_MARK in ids or processor.image_token_id in ids) else {}
    with torch.no_grad():
        row = expanded(processor, ids, processor.count_image_tokens(len(pixels)))
        logits: Tensor = row_output(loaded, row, images).logits[0]
    return logits


def inputs_of(processor: LlavaMedProcessor, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Return images as keywords of the model."""
    sizes = [image.size for image in images] if processor.has_variable_images else []
    return batch_images([processor.preprocess(image) for image in images], sizes).keywords()


def shown(processor: LlavaMedProcessor, ids: Any, images: list[Image.Image]) -> list[Image.Image]:
    """Return the images with a placeholder in the ids; the original may have cut others off."""
    marks = sum(i == IMAGE_MARK for i in ids)
    if marks == 0 and processor.image_token_id in ids:  # the ids hold patch tokens already
        return images
    return images[:marks]


def first_of(arrays: Any, *names: str) -> Any:
    """Return the first of these arrays that exists."""
    return arrays[next(name for name in names if name in arrays)]


def batch_rows(oracle: Oracle, loaded: LoadedModel, key: str, names: list[str]) -> list[Row]:
    """Return the rows of a recorded batch."""
    arrays = oracle.arrays("forward.npz")
    mask = first_of(arrays, f"{key}/in_attention_mask", f"{key}/attention_mask")
    labels = first_of(arrays, f"{key}/in_labels", f"{key}/labels")
    spliced = first_of(arrays, f"{key}/spliced_mask", f"{key}/in_attention_mask", f"{key}/attention_mask")
    rows = []
    for number, name in enumerate(names):
        ids = arrays[f"{key}/input_ids"][number][mask[number]]
        images = shown(loaded.processor, ids, oracle.images(name))
        counts = loaded.processor.count_image_tokens(len(images), [image.size for image in images])
        marks, lengths = ids == IMAGE_MARK, np.ones(len(ids), dtype=int)
        lengths[marks] = counts[: int(marks.sum())]
        trained = np.repeat(np.where(marks, IGNORE_INDEX, labels[number][mask[number]]), lengths)
        places = np.flatnonzero(spliced[number])
        inputs = inputs_of(loaded.processor, images)
        rows.append(Row(expanded(loaded.processor, ids, counts), trained.tolist(), inputs, places[: len(trained)]))
    return rows


def loss_of(pairs: list[tuple[Tensor, list[int]]], vocabulary: int) -> Tensor:
    """Return the mean loss over the trained tokens of some rows, within the original's vocabulary."""
    logits = torch.cat([scores[:-1, :vocabulary] for scores, _ in pairs])
    targets = torch.cat([torch.tensor(labels[1:]) for _, labels in pairs])
    return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)


def forward(oracle: Oracle) -> Iterator[Line]:
    """Compare `forward.npz` batch by batch."""
    for key, meta in oracle.json("forward_meta.json").items():
        if "ids" not in meta:
            continue
        prefix, _, _ = key.rpartition("/")
        folder = oracle.model(prefix or None)
        loaded = loaded_from(oracle.path, str(folder.relative_to(oracle.path)))
        yield from _batch(oracle, loaded, key, meta)


def _batch(oracle: Oracle, loaded: LoadedModel, key: str, meta: dict[str, Any]) -> Iterator[Line]:
    arrays = oracle.arrays("forward.npz")
    rows = batch_rows(oracle, loaded, key, meta["ids"])
    embeddings: list[Tensor] = []
    hook = loaded.model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: embeddings.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    with torch.no_grad():
        outputs = [row_output(loaded, row.ids, row.images).logits[0] for row in rows]
    hook.remove()
    if f"{key}/spliced_labels" in arrays:
        recorded = arrays[f"{key}/spliced_labels"]
        labels = Differences()
        for number, row in enumerate(rows):
            labels.add(row.labels[: len(row.places)], recorded[number][row.places])
            # Only what the original cut off may be missing.
            ends = len(row.places) == len(row.labels) or len(row.places) == meta.get("tokenizer_model_max_length")
            labels.add(int(ends), 1)
        yield within(f"spliced layout {key}", labels.largest, 0, f"{labels.num_compared} positions")
    if any(name.startswith(f"{key}/spliced_embeds_stride") for name in arrays):
        found = _strided(embeddings, rows, *strided(arrays, f"{key}/spliced_embeds_stride"))
        yield within(f"spliced embeddings {key}", found.largest, LOGIT_TOLERANCE, f"{found.num_compared} values")
    recorded, stride = strided(arrays, f"{key}/logits_stride")
    found = _strided(outputs, rows, recorded, stride)
    yield within(f"logits {key}", found.largest, LOGIT_TOLERANCE, f"{found.num_compared} values")
    pairs = [(out[: len(row.places)], row.labels[: len(row.places)]) for out, row in zip(outputs, rows, strict=True)]
    difference = abs(float(loss_of(pairs, recorded.shape[-1])) - meta["loss"])
    yield within(f"loss {key}", difference, LOSS_TOLERANCE)
    yield from _features(oracle, loaded, key, meta["ids"])


def strided(arrays: Any, prefix: str) -> tuple[np.ndarray, int]:
    """Return an array of every n-th position, and n, which ends its name."""
    name = next(name for name in arrays if name.startswith(prefix))
    return arrays[name], int(name.removeprefix(prefix))


def _strided(ours: list[Tensor], rows: list[Row], recorded: np.ndarray, stride: int) -> Differences:
    """Compare at every `stride`-th position of the recorded batch."""
    found = Differences()
    for number, (values, row) in enumerate(zip(ours, rows, strict=True)):
        kept = [(index, place // stride) for index, place in enumerate(row.places) if place % stride == 0]
        mine = values[[index for index, _ in kept], : recorded.shape[-1]]
        found.add(mine.numpy(), recorded[number][[place for _, place in kept]])
    return found


def _features(oracle: Oracle, loaded: LoadedModel, key: str, names: list[str]) -> Iterator[Line]:
    """Compare features of tower and projector of every image (text-only rows have a dummy image)."""
    arrays = oracle.arrays("forward.npz")
    if f"{key}/tower_features" not in arrays:
        return
    tower, projected = Differences(), Differences()
    images = [oracle.images(name) for name in names]
    recorded = arrays[f"{key}/tower_features"]
    has_dummies = len(recorded) == sum(max(1, len(each)) for each in images)
    place = 0
    for each in images:
        if each:
            with torch.no_grad():
                features = loaded.model.tower_features(loaded.processor.pixels(each))
                output: Any = loaded.model.model.get_image_features(features).pooler_output
            tower.add(features.numpy(), recorded[place : place + len(each)])
            projected.add(torch.stack(list(output)).numpy(), arrays[f"{key}/projected"][place : place + len(each)])
        place += len(each) or int(has_dummies)
    yield within(f"tower features {key}", tower.largest, LOGIT_TOLERANCE, f"{tower.num_compared} values")
    yield within(f"projected features {key}", projected.largest, LOGIT_TOLERANCE, f"{projected.num_compared} values")


def adapter(oracle: Oracle) -> Iterator[Line]:
    """Compare `lora_forward.npz`: the batch that `grads.json` names, through base and adapter."""
    recorded = oracle.arrays("lora_forward.npz")
    values, stride = strided(recorded, "logits_stride")
    key = _batch_of(oracle, len(values))
    for folder in oracle.adapters:
        base = oracle.language_models[0]
        names = [str(path.relative_to(oracle.path)) for path in (folder, base)]
        loaded = loaded_from(oracle.path, *names)
        rows = batch_rows(oracle, loaded, key, oracle.json("forward_meta.json")[key]["ids"])
        with torch.no_grad():
            outputs = [row_output(loaded, row.ids, row.images).logits[0] for row in rows]
        found = _strided(outputs, rows, values, stride)
        yield within(f"adapter logits {key}", found.largest, LOGIT_TOLERANCE, f"{found.num_compared} values")
        pairs = [(output, row.labels) for output, row in zip(outputs, rows, strict=True)]
        loss = float(loss_of(pairs, values.shape[-1]))
        yield within(f"adapter loss {key}", abs(loss - float(recorded["loss"])), LOSS_TOLERANCE)


def _batch_of(oracle: Oracle, num_rows: int) -> str:
    """Return the batch with recorded gradients; without them, the first one with `num_rows` rows."""
    batches = oracle.json("forward_meta.json")
    if oracle.has("grads.json"):
        rows = oracle.json("grads.json")["batch"]
        return next(key for key, meta in batches.items() if meta.get("ids") == rows)
    return str(next(key for key, meta in batches.items() if len(meta.get("ids", ())) == num_rows))


def gradients(oracle: Oracle) -> Iterator[Line]:
    """Compare `grads.json`: norm of every parameter's gradient for one batch."""
    recorded = oracle.json("grads.json")
    batches = oracle.json("forward_meta.json")
    key = next(key for key, meta in batches.items() if meta.get("ids") == recorded["batch"])
    folder = str(oracle.model().relative_to(oracle.path))
    loaded = loaded_from(oracle.path, folder)
    vocabulary = strided(oracle.arrays("forward.npz"), f"{key}/logits_stride")[0].shape[-1]
    freeze_for(loaded.model)
    rows = batch_rows(oracle, loaded, key, recorded["batch"])
    pairs = [(row_output(loaded, row.ids, row.images).logits[0], row.labels) for row in rows]
    loss = loss_of(pairs, vocabulary)
    loss.backward()
    found = {name: parameter.grad for name, parameter in loaded.model.named_parameters()}
    worst, compared = 0.0, 0
    for old, norm in recorded["grad_norms"].items():
        gradient = found.get(current_name(old))
        if gradient is None:
            worst = max(worst, float(bool(norm)))
            continue
        # Our vocabulary is longer by the placeholder.
        wide = gradient.shape[0] > vocabulary and old.endswith(("embed_tokens.weight", "lm_head.weight"))
        mine = float((gradient[:vocabulary] if wide else gradient).norm())
        worst, compared = max(worst, abs(mine - norm) / max(norm, 1e-12)), compared + 1
    loaded.model.zero_grad(set_to_none=True)
    loaded.model.requires_grad_(False)
    note = f"{compared} of {len(recorded['grad_norms'])} norms, relative"
    yield within(f"gradients {key}", worst if compared else float("nan"), GRADIENT_TOLERANCE, note)
