"""Rows of recorded batches as input of our model, and the checks of recorded adapters and gradients.

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

from benchmarks.fidelity.folder import IMAGE_MARK, MAX_LISTED, Differences, Line, Oracle, within
from benchmarks.fidelity.original_rows import turns_of
from benchmarks.fidelity.recorded_weights import current_name
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.data.image_batch import batch_images
from llava.model.builder import LoadedModel
from llava.model.lora import freeze_for
from llava.processing import LlavaMedProcessor

LOGIT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-4
"""Relative tolerance of gradient norms."""

TINY = 1e-12
"""Norm that is recorded where rounding alone is left."""


@dataclass(frozen=True)
class Row:
    """Recorded row as input of our model.

    Attributes:
        ids: token ids with our placeholders for images.
        labels: labels of `ids`.
        images: model inputs of its images, by keyword of the model.
        places: its positions in the recorded batch; shorter than `ids` if the original cut the row.
        pictured: its images.
    """

    ids: list[int]
    labels: list[int]
    images: dict[str, Tensor]
    places: np.ndarray
    pictured: list[Image.Image]


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


def batch_rows(oracle: Oracle, loaded: LoadedModel, key: str, names: Sequence[str]) -> list[Row]:
    """Return the rows of a recorded batch.

    Raises:
        LookupError: a row of the batch is none of the folder.
    """
    arrays = oracle.arrays("forward.npz")
    mask = first_of(arrays, f"{key}/in_attention_mask", f"{key}/attention_mask")
    labels = first_of(arrays, f"{key}/in_labels", f"{key}/labels")
    spliced = first_of(arrays, f"{key}/spliced_mask", f"{key}/in_attention_mask", f"{key}/attention_mask")
    rows = []
    for number, name in enumerate(row_names(names, len(mask))):
        ids = arrays[f"{key}/input_ids"][number][mask[number]]
        pictured = shown(loaded.processor, ids, oracle.images_of(_source(oracle, loaded.processor, name, ids)))
        counts = loaded.processor.count_image_tokens(len(pictured), [image.size for image in pictured])
        marks, lengths = ids == IMAGE_MARK, np.ones(len(ids), dtype=int)
        lengths[marks] = counts[: int(marks.sum())]
        trained = np.repeat(np.where(marks, IGNORE_INDEX, labels[number][mask[number]]), lengths)
        places = np.flatnonzero(spliced[number])[: len(trained)]
        inputs = inputs_of(loaded.processor, pictured)
        rows.append(Row(expanded(loaded.processor, ids, counts), trained.tolist(), inputs, places, pictured))
    return rows


def row_names(names: Sequence[str], num_rows: int) -> list[str | None]:
    """Return one name for each row of a batch; None where the record names fewer rows than it holds."""
    listed: list[str | None] = [names] if isinstance(names, str) else [str(name) for name in names]
    return (listed + [None] * num_rows)[: max(num_rows, len(listed))]


def _source(oracle: Oracle, processor: LlavaMedProcessor, name: str | None, ids: Any) -> dict[str, Any]:
    """Return the row of `data.json` of recorded ids; of several with that name, the one with that text."""
    rows = oracle.json("data.json")
    named = [row for row in rows if name is None or str(row["id"]) == name]
    if len(named) == 1:
        return dict(named[0])
    text = _letters(processor.decode([int(token) for token in ids if token >= 0]))
    fitting = [row for row in named if all(_letters(turn.text) in text for turn in turns_of(row)[-2:])]
    if not fitting:
        raise LookupError(f"no row of data.json has the ids of the batch's row {name or 'without a name'}")
    return dict(max(fitting, key=lambda row: sum(len(turn.text) for turn in turns_of(row))))


def _letters(text: str) -> str:
    """Return the text without white space and image placeholders."""
    return "".join(text.replace(IMAGE_TOKEN, "").split())


def loss_of(pairs: list[tuple[Tensor, list[int]]], vocabulary: int) -> Tensor:
    """Return the mean loss over the trained tokens of some rows, within the original's vocabulary."""
    logits = torch.cat([scores[:-1, :vocabulary] for scores, _ in pairs])
    targets = torch.cat([torch.tensor(labels[1:]) for _, labels in pairs])
    return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)


def strided(arrays: Any, prefix: str) -> tuple[np.ndarray, int]:
    """Return an array of every n-th position, and n, which ends its name.

    Raises:
        LookupError: no array has that name.
    """
    name = next((name for name in arrays if name.startswith(prefix)), None)
    if name is None:
        raise LookupError(f"no array {prefix}N is recorded")
    return arrays[name], int(name.removeprefix(prefix))


def at_stride(ours: list[Tensor], rows: list[Row], recorded: np.ndarray, stride: int) -> Differences:
    """Compare at every `stride`-th position of the recorded batch."""
    found = Differences()
    for number, (values, row) in enumerate(zip(ours, rows, strict=True)):
        kept = [(index, place // stride) for index, place in enumerate(row.places) if place % stride == 0]
        mine = values[[index for index, _ in kept], : recorded.shape[-1]]
        found.add(mine.numpy(), recorded[number][[place for _, place in kept]])
    if len(recorded) != len(rows):
        raise ValueError(f"{len(recorded)} rows are recorded for a batch of {len(rows)}")
    return found


def adapter(oracle: Oracle) -> Iterator[Line]:
    """Compare `lora_forward.npz`: the batch that `grads.json` names, through base and adapter."""
    recorded = oracle.arrays("lora_forward.npz")
    values, stride = strided(recorded, "logits_stride")
    key = _batch_of(oracle, len(values))
    for folder in oracle.adapters:
        loaded = oracle.loaded(folder, oracle.language_models[0])
        rows = batch_rows(oracle, loaded, key, oracle.json("forward_meta.json")[key]["ids"])
        with torch.no_grad():
            outputs = [row_output(loaded, row.ids, row.images).logits[0] for row in rows]
        found = at_stride(outputs, rows, values, stride)
        yield found.line(f"adapter logits {key}", LOGIT_TOLERANCE)
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
    """Compare `grads.json`: loss, and norm of every parameter's gradient, for one batch."""
    recorded = oracle.json("grads.json")
    batches = oracle.json("forward_meta.json")
    key = next(key for key, meta in batches.items() if meta.get("ids") == recorded["batch"])
    vocabulary = strided(oracle.arrays("forward.npz"), f"{key}/logits_stride")[0].shape[-1]
    loss, ours = _gradients(oracle, key, vocabulary)
    if "loss" in recorded:
        yield within(f"gradients loss {key}", abs(loss - recorded["loss"]), LOSS_TOLERANCE)
    theirs = {current_name(old): norm for old, norm in recorded["grad_norms"].items()}
    found = Differences()
    for name, norm in theirs.items():
        mine = ours.get(name, 0.0)  # a parameter without a gradient has none in the record either
        found.add(mine / max(norm, TINY), norm / max(norm, TINY))
    note = f"{found.num_compared} of {len(ours)} norms, relative"
    lacking = sorted(ours.keys() - theirs.keys())
    note += f"; not recorded: {', '.join(lacking[:MAX_LISTED])}" if lacking else ""
    worst = float("nan") if lacking else found.largest
    yield within(f"gradients {key}", worst, GRADIENT_TOLERANCE, note, count=found.num_compared)


def _gradients(oracle: Oracle, key: str, vocabulary: int) -> tuple[float, dict[str, float]]:
    """Return loss and gradient norms of our model for a batch, without the rows that only our vocabulary has."""
    loaded = oracle.loaded(oracle.model())
    freeze_for(loaded.model)
    rows = batch_rows(oracle, loaded, key, oracle.json("grads.json")["batch"])
    pairs = [(row_output(loaded, row.ids, row.images).logits[0], row.labels) for row in rows]
    loss = loss_of(pairs, vocabulary)
    loss.backward()
    norms = {}
    for name, parameter in loaded.model.named_parameters():
        if parameter.grad is not None:
            wide = parameter.shape[0] > vocabulary and name.endswith(("embed_tokens.weight", "lm_head.weight"))
            norms[name] = float((parameter.grad[:vocabulary] if wide else parameter.grad).norm())
    loaded.model.zero_grad(set_to_none=True)
    loaded.model.requires_grad_(False)
    return float(loss.detach()), norms
