"""Check of recorded forward passes: layout, embeddings, logits, loss, features, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.fidelity.folder import IMAGE_MARK, Differences, Line, Oracle, mismatches, within
from benchmarks.fidelity.numbers import (
    LOGIT_TOLERANCE,
    LOSS_TOLERANCE,
    Row,
    at_stride,
    batch_rows,
    first_of,
    inputs_of,
    loss_of,
    row_output,
    strided,
)
from benchmarks.fidelity.shifted_images import handed_out
from benchmarks.fidelity.texts import prompt_ids, templates_of
from llava.constants import IGNORE_INDEX
from llava.conversation import TEMPLATES
from llava.model.builder import LoadedModel

HALF_TOLERANCE = 2.0**-10
"""Tolerance of pixels of at most 4 in float16: half a unit in the last place is 2^-10."""

LOST_BETA = "loss_with_sim_beta_lost"
"""Loss of a cluster projector whose `sim_beta` was not loaded."""

SETTINGS = ("padding_side", "template", "n_images", "prompts")
"""Compared entries of the description of a batch."""

NUM_FIRST = 8
"""Tokens of a system prompt that identify it."""

TOKENS = {"im_patch": "<im_patch>", "im_start": "<im_start>", "im_end": "<im_end>"}


def forward(oracle: Oracle) -> Iterator[Line]:
    """Compare `forward.npz` batch by batch, and the other entries of its description."""
    metas = oracle.json("forward_meta.json")
    recorded = {name.rpartition("/")[0] for name in oracle.arrays("forward.npz")}
    batches = {key: meta for key, meta in metas.items() if "ids" in meta}
    unknown = sorted(recorded ^ batches.keys())
    num_named = sum(1 if isinstance(meta["ids"], str) else len(meta["ids"]) for meta in batches.values())
    yield mismatches("batches", unknown, f"{len(batches)} batches", count=len(batches) + num_named)
    for key, meta in batches.items():
        yield from _Batch(oracle, key, meta).lines()
    for key, meta in metas.items():
        if key.endswith("/tokens"):
            yield _tokens(oracle, key, meta)
        elif key == "sim_beta":
            loaded = oracle.loaded(oracle.model())
            ours = float(loaded.model.model.multi_modal_projector.sim_beta.detach())
            yield within("saved sim_beta", abs(ours - meta["saved"]), 0)


def _tokens(oracle: Oracle, key: str, meta: dict[str, Any]) -> Line:
    """Compare the recorded vocabulary of a checkpoint: its length and its added tokens."""
    loaded = oracle.loaded(oracle.model(key.rpartition("/")[0]))
    words = loaded.processor.tokenizer.get_vocab()
    table = loaded.model.get_input_embeddings().weight
    # Ours may add one token: the placeholder.
    ours = {"len": meta["len"] if meta["len"] == meta["embed_rows"] <= len(table) <= meta["len"] + 1 else len(table)}
    ours |= {name: words.get(word) for name, word in TOKENS.items()} | {"pad_id": words.get(meta["pad"])}
    ours["embed_rows"] = ours["len"]
    wrong = [name for name, value in ours.items() if meta[name] != value]
    return mismatches(f"tokens {key.rpartition('/')[0]}", wrong, f"{len(ours)} numbers", count=len(ours))


class _Batch:
    """Recorded batch, and our rows and outputs of it."""

    def __init__(self, oracle: Oracle, key: str, meta: dict[str, Any]) -> None:
        self.oracle, self.key, self.meta = oracle, key, meta
        self.arrays = oracle.arrays("forward.npz")
        self.loaded: LoadedModel = oracle.loaded(oracle.model(key.rpartition("/")[0] or None))
        self.rows: list[Row] = batch_rows(oracle, self.loaded, key, meta["ids"])
        self.embeddings: list[Tensor] = []
        self.outputs = self._compute(self.rows)
        self.explained = ""

    def get(self, name: str) -> np.ndarray:
        """Return an array of the batch."""
        return self.arrays[f"{self.key}/{name}"]

    def has(self, name: str) -> bool:
        """Return whether an array of the batch is recorded."""
        return f"{self.key}/{name}" in self.arrays

    def lines(self) -> Iterator[Line]:
        """Yield all comparisons of the batch."""
        logits = self._logits()
        yield self._collated()
        if self.has("spliced_labels"):
            yield self._layout()
        if any(name.startswith(f"{self.key}/spliced_embeds_stride") for name in self.arrays):
            recorded, stride = strided(self.arrays, f"{self.key}/spliced_embeds_stride")
            found = at_stride(self.embeddings, self.rows, recorded, stride)
            yield found.line(f"spliced embeddings {self.key}", LOGIT_TOLERANCE)
        yield logits
        if self.has("logits_argmax"):
            yield self._argmax()
        yield self._loss()
        if LOST_BETA in self.meta:
            yield self._lost_beta()
        if self.has("images"):
            yield self._pixels()
        if self.has("tower_features"):
            yield from self._features()

    def _compute(self, rows: Sequence[Row]) -> list[Tensor]:
        """Return our logits of each row, and keep the embeddings."""
        found = [_row_forward(self.loaded, row) for row in rows]
        self.embeddings = [embeddings for _, embeddings in found]
        return [logits for logits, _ in found]

    def _logits(self) -> Line:
        """Compare the logits; images that LLaVA-Med 1.0 gave to other rows may explain them."""
        recorded, stride = strided(self.arrays, f"{self.key}/logits_stride")
        found = at_stride(self.outputs, self.rows, recorded, stride)
        is_near = found.largest <= LOGIT_TOLERANCE
        if not is_near and "shifted_images" in self.oracle.compat and (moved := self._shifted_rows()):
            usual = self.embeddings
            outputs = self._compute(moved)
            other = at_stride(outputs, moved, recorded, stride)
            if other.largest <= LOGIT_TOLERANCE:
                self.rows, self.outputs, found, self.explained = moved, outputs, other, ", shifted_images"
            else:
                self.embeddings = usual
        return found.line(f"logits {self.key}", LOGIT_TOLERANCE, f"values{self.explained}")

    def _shifted_rows(self) -> list[Row]:
        """Return the rows with the images of LLaVA-Med 1.0; none if they are the same or placed otherwise."""
        if (self.get("input_ids") == IMAGE_MARK).any():
            return []
        height, width = self.loaded.processor.image_size
        empty = {"pixel_values": torch.zeros(1, 3, height, width)}
        given = handed_out([row.images or empty for row in self.rows], [bool(row.images) for row in self.rows])
        moved = [
            replace(row, images=images) if row.images and images is not row.images else row
            for row, images in zip(self.rows, given, strict=True)
        ]
        return moved if any(new is not row for new, row in zip(moved, self.rows, strict=True)) else []

    def _collated(self) -> Line:
        """Compare the padding of ids, labels and mask, and the settings of the description."""
        mask = first_of(self.arrays, f"{self.key}/in_attention_mask", f"{self.key}/attention_mask")
        labels = first_of(self.arrays, f"{self.key}/in_labels", f"{self.key}/labels")
        ids, wrong = self.get("input_ids"), []
        wrong += [] if len(np.unique(ids[~mask])) <= 1 else ["padded ids"]
        wrong += [] if (labels[~mask] == IGNORE_INDEX).all() else ["padded labels"]
        wrong += [] if ((labels == ids) | (labels == IGNORE_INDEX)).all() else ["labels"]
        wrong += [] if _is_padded(mask, "right") else ["mask"]
        side = self.meta.get("padding_side", "right")
        placed = self.get("spliced_mask") if self.has("spliced_mask") else mask
        wrong += [] if _is_padded(placed, side) else ["padding side"]
        if "template" in self.meta:
            wrong += [] if self._starts_as(self.meta["template"]) else ["template"]
        if "n_images" in self.meta:
            wrong += [] if self.meta["n_images"] == len(self.get("tower_features")) else ["n_images"]
        if "prompts" in self.meta:
            texts = [prompt_ids(text, self.loaded.processor) for text in self.meta["prompts"]]
            theirs = [_marked(row.ids, self.loaded.processor.image_token_id) for row in self.rows]
            wrong += [f"prompt {n}" for n, (a, b) in enumerate(zip(texts, theirs, strict=True)) if _marked(a) != b]
        settings = [
            self.meta[name] for name in ("padding_side", "template", "n_images", "prompts") if name in self.meta
        ]
        count = ids.size + sum(len(value) if isinstance(value, list) else 1 for value in settings)
        return mismatches(f"collated {self.key}", wrong, f"{ids.size} positions", count=count)

    def _starts_as(self, template: str) -> bool:
        """Return whether every row starts as the system prompt of a template."""
        starts = [prompt_ids(TEMPLATES[key].system, self.loaded.processor) for key in templates_of(template)]
        return any(all(row.ids[:NUM_FIRST] == start[:NUM_FIRST] for row in self.rows) for start in starts)

    def _layout(self) -> Line:
        """Compare labels and mask after images were inserted, padding included."""
        recorded, mask = self.get("spliced_labels"), self.get("spliced_mask")
        limit, added = self.meta.get("tokenizer_model_max_length"), mask.shape[1] - self.get("input_ids").shape[1]
        found, wrong = Differences(), []
        for number, row in enumerate(self.rows):
            length = len(row.places)
            expected = np.full(recorded.shape[1], IGNORE_INDEX)
            expected[row.places] = row.labels[:length]
            found.add(expected, recorded[number])
            # Only what the original cut off may be missing; LLaVA-Rad's mask is longer by the images of other rows.
            is_whole = length == len(row.labels) or length == limit
            marked = np.flatnonzero(mask[number])
            at_edge = len(marked) > 0 and (marked[0] == 0 or marked[-1] == mask.shape[1] - 1)
            is_block = at_edge and len(marked) == marked[-1] - marked[0] + 1
            wrong += [] if is_whole and is_block and len(marked) in (length, length + added) else [number]
        worst = float("nan") if wrong else found.largest
        return within(
            f"spliced layout {self.key}", worst, 0, f"{found.num_compared} positions", count=found.num_compared
        )

    def _argmax(self) -> Line:
        """Compare the likeliest token at every position of the rows; rounding may decide between close logits."""
        recorded, found = self.get("logits_argmax"), Differences()
        vocabulary = strided(self.arrays, f"{self.key}/logits_stride")[0].shape[-1]
        for number, row in enumerate(self.rows):
            scores = self.outputs[number][: len(row.places), :vocabulary]
            theirs = torch.from_numpy(recorded[number][row.places]).long()
            is_token = (theirs >= 0) & (theirs < vocabulary)
            chosen = scores.gather(1, theirs.clamp(0, vocabulary - 1)[:, None])[:, 0]
            behind = torch.where(is_token, scores.max(dim=1).values - chosen, torch.inf)
            found.add(behind.numpy(), np.zeros(len(behind)))
        return found.line(f"likeliest tokens {self.key}", 2 * LOGIT_TOLERANCE, "positions")

    def _own_loss(self, outputs: Sequence[Tensor]) -> float:
        vocabulary = strided(self.arrays, f"{self.key}/logits_stride")[0].shape[-1]
        pairs = [
            (out[: len(row.places)], row.labels[: len(row.places)]) for out, row in zip(outputs, self.rows, strict=True)
        ]
        return float(loss_of(pairs, vocabulary))

    def _loss(self) -> Line:
        found, ours = Differences(), self._own_loss(self.outputs)
        found.add(ours, self.meta["loss"])
        if self.has("loss"):
            found.add(ours, float(self.get("loss")))
        return found.line(f"loss {self.key}", LOSS_TOLERANCE, f"values{self.explained}")

    def _lost_beta(self) -> Line:
        """Compare the loss with the `sim_beta` that the original had after loading."""
        beta = self.loaded.model.model.multi_modal_projector.sim_beta
        usual, embeddings = beta.detach().clone(), self.embeddings
        with torch.no_grad():
            beta.fill_(self.oracle.json("forward_meta.json")["sim_beta"]["after_from_pretrained"])
            loss = self._own_loss(self._compute(self.rows))
            beta.copy_(usual)
        self.embeddings = embeddings
        difference = abs(loss - self.meta[LOST_BETA])
        return within(f"loss without sim_beta {self.key}", difference, LOSS_TOLERANCE)

    def _pixels(self) -> Line:
        """Compare the float16 pixels of the first image of each row; text-only rows have an empty image."""
        found, recorded = Differences(), self.get("images")
        for number, row in enumerate(self.rows):
            theirs = recorded[number].astype(np.float64)
            ours = row.images["pixel_values"][0].numpy() if row.images else np.zeros(theirs.shape)
            found.add(ours, theirs)
        return found.line(f"pixels {self.key}", HALF_TOLERANCE)

    def _features(self) -> Iterator[Line]:
        """Compare features of tower and projector of every image (text-only rows may have an empty image)."""
        tower, projected = Differences(), Differences()
        recorded, place = self.get("tower_features"), 0
        has_dummies = len(recorded) == sum(max(1, len(row.pictured)) for row in self.rows)
        height, width = self.loaded.processor.image_size
        for row in self.rows:
            given = inputs_of(self.loaded.processor, row.pictured)
            empty = torch.zeros(1, 3, height, width) if has_dummies else torch.zeros(0, 3, height, width)
            pixels = given["pixel_values"] if row.pictured else empty
            if not len(pixels):
                continue
            with torch.no_grad():
                features = self.loaded.model.tower_features(pixels)
                output: Any = self.loaded.model.model.get_image_features(features).pooler_output
            tower.add(features.numpy(), recorded[place : place + len(pixels)])
            projected.add(torch.stack(list(output)).numpy(), self.get("projected")[place : place + len(pixels)])
            place += len(pixels)
        if place != len(recorded):
            raise ValueError(f"{len(recorded)} images are recorded, {place} are in the rows of {self.key}")
        yield tower.line(f"tower features {self.key}", LOGIT_TOLERANCE)
        yield projected.line(f"projected features {self.key}", LOGIT_TOLERANCE)


_FORWARD: dict[Any, tuple[Tensor, Tensor]] = {}
"""Logits and embeddings of rows by model, `sim_beta`, ids and pixels, so that a changed record needs no new output."""


def _row_forward(loaded: LoadedModel, row: Row) -> tuple[Tensor, Tensor]:
    """Return logits [T, V] and embeddings [T, D] of one unpadded row."""
    pixels = tuple((name, tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in row.images.items())
    beta = getattr(loaded.model.model.multi_modal_projector, "sim_beta", None)  # `_lost_beta` changes it
    key = (id(loaded), None if beta is None else float(beta.detach()), tuple(row.ids), pixels)
    if key not in _FORWARD:
        embeddings: list[Tensor] = []
        hook = loaded.model.model.language_model.register_forward_pre_hook(
            lambda _, __, kwargs: embeddings.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        try:
            with torch.no_grad():
                _FORWARD[key] = row_output(loaded, row.ids, row.images).logits[0], embeddings[0]
        finally:
            hook.remove()
    return _FORWARD[key]


def _is_padded(mask: np.ndarray, side: str) -> bool:
    """Return whether every row of a mask is set on the other side of its padding, without a gap."""
    rows = mask if side == "right" else mask[:, ::-1]
    return side in ("left", "right") and bool(rows[:, 0].all() and (np.diff(rows.astype(int), axis=1) <= 0).all())


def _marked(ids: Sequence[int], image_token: int = IMAGE_MARK) -> list[int]:
    """Return ids with one mark for each run of image tokens."""
    marked = [IMAGE_MARK if token == image_token else token for token in ids]
    return [token for at, token in enumerate(marked) if token != IMAGE_MARK or marked[at - 1 : at] != [IMAGE_MARK]]
