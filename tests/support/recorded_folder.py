"""Folder in the format of the recorded oracles with other names, strides and several images per row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import CLIPImageProcessorPil

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.data.encode import Encoded, encode
from llava.model.builder import LoadedModel
from llava.model.checkpoint.load import load_checkpoint
from llava.samples import from_row, with_placeholders
from tests.support.legacy_folders import write_legacy
from tests.support.tiny import tiny_image

STRIDE = 3
NUM_NEW = 7

ROWS: list[dict[str, Any]] = [
    {"id": "both", "image": ["a.png", "c.png"], "turns": ["<image>\n<image>\nWhich one is older?", "the first"]},
    {"id": "long", "image": "b.png", "turns": ["<image>\nDescribe it.", "word " * 60, "And more?", "no " * 30]},
    {"id": "none", "turns": ["Without any picture?", "Yes."]},
    {"id": "short", "image": "c.png", "turns": ["What is shown?\n<image>", "A bone."]},
]


def write_recorded(folder: Path) -> Path:
    """Write a model, images, conversations, and results of the library's own padded calls."""
    folder.mkdir()
    checkpoint = write_legacy(folder, name="any-model", image_aspect_ratio="square")
    (folder / "images").mkdir()
    for number, (name, size) in enumerate({"a.png": (40, 30), "b.png": (28, 50), "c.png": (33, 33)}.items()):
        tiny_image(number, 64).resize(size).save(folder / "images" / name)
    rows = [_row(row) for row in ROWS]
    (folder / "data.json").write_text(json.dumps(rows))
    loaded = load_checkpoint(checkpoint)
    encoded = [_encoded(row, loaded) for row in rows]
    arrays: dict[str, Any] = {}
    meta = {}
    for key, chosen in {"some": [0, 1, 2], "others": [3, 1]}.items():
        found, loss = _batch(folder, loaded, [(rows[n], encoded[n]) for n in chosen])
        arrays |= {f"{key}/{name}": value for name, value in found.items()}
        meta[key] = {"ids": [rows[n]["id"] for n in chosen], "loss": loss}
    np.savez(folder / "forward.npz", **arrays)
    (folder / "forward_meta.json").write_text(json.dumps(meta))
    (folder / "generate.json").write_text(json.dumps([_generated(folder, loaded, row) for row in rows]))
    image_processor = CLIPImageProcessorPil.from_pretrained(folder / "tower")
    square = {}
    for name in ("a.png", "b.png", "c.png"):
        with Image.open(folder / "images" / name) as image:
            square[f"square/{name}"] = image_processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
    np.savez(folder / "image_preprocess.npz", **square)
    return folder


def _row(row: dict[str, Any]) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(row["turns"])]
    return {**{key: value for key, value in row.items() if key != "turns"}, "conversations": turns}


def _encoded(row: dict[str, Any], loaded: LoadedModel) -> Encoded:
    sample = from_row(row)
    return encode(with_placeholders(sample), loaded.processor, images=sample.images, max_length=None)


def _collapsed(encoded: Encoded, values: Any, mark: int) -> list[int]:
    """Return the values of a row with one entry for each image."""
    found, place = [], 0
    for start, stop in encoded.image_spans:
        found += [*values[place:start], mark]
        place = stop
    return [*found, *values[place:]]


def _pixels(folder: Path, row: dict[str, Any], loaded: LoadedModel) -> list[Any]:
    names = [row["image"]] if isinstance(row.get("image"), str) else row.get("image", [])
    return [loaded.processor.preprocess(Image.open(folder / "images" / name).convert("RGB")) for name in names]


def _batch(
    folder: Path, loaded: LoadedModel, rows: list[tuple[dict[str, Any], Encoded]]
) -> tuple[dict[str, Any], float]:
    """Return the arrays of a right-padded batch, and its loss."""
    longest = max(len(encoded.input_ids) for _, encoded in rows)
    short = [(_collapsed(e, e.input_ids, -200), _collapsed(e, e.labels, IGNORE_INDEX)) for _, e in rows]
    width = max(len(ids) for ids, _ in short)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE_INDEX)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    given = np.zeros((3, len(rows), width), dtype=np.int64)
    given[1] = IGNORE_INDEX
    for number, ((_, encoded), (row_ids, row_labels)) in enumerate(zip(rows, short, strict=True)):
        length = len(encoded.input_ids)
        ids[number, :length], labels[number, :length] = torch.tensor([encoded.input_ids, encoded.labels])
        mask[number, :length] = True
        given[:, number, : len(row_ids)] = [row_ids, row_labels, [1] * len(row_ids)]
    pixels = torch.stack([image for row, _ in rows for image in _pixels(folder, row, loaded)])
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, attention_mask=mask.long(), pixel_values=pixels).logits[..., :-1]
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    arrays = {
        "input_ids": given[0],
        "in_labels": given[1],
        "in_attention_mask": given[2].astype(bool),
        "spliced_labels": labels.numpy(),
        "spliced_mask": mask.numpy(),
        f"logits_stride{STRIDE}": logits[:, ::STRIDE].numpy(),
    }
    return arrays, float(loss)


def _generated(folder: Path, loaded: LoadedModel, row: dict[str, Any]) -> dict[str, Any]:
    """Return the library's greedy answer to the first question."""
    processor = loaded.processor
    text = f"{processor.template.system} USER: {row['conversations'][0]['value']} ASSISTANT:"
    ids = list(processor.text.bos_ids)
    given = list(ids)
    for number, piece in enumerate(text.split(IMAGE_TOKEN)):
        ids += ([processor.image_token_id] * processor.num_image_tokens if number else []) + processor.text(piece).ids
        given += ([-200] if number else []) + processor.text(piece).ids
    pixels = _pixels(folder, row, loaded)
    images = {"pixel_values": torch.stack(pixels)} if pixels else {}
    with torch.no_grad():
        out = loaded.model.generate(
            input_ids=torch.tensor([ids]),
            do_sample=False,
            max_new_tokens=NUM_NEW,
            return_dict_in_generate=True,
            output_logits=True,
            **images,
        )
    new = out.sequences[0, len(ids) :].tolist()
    # The last row of the vocabulary is our placeholder, which an original lacks.
    margins = [float(best[0] - best[1]) for best in (scores[0, :-1].topk(2).values for scores in out.logits)]
    return {"id": row["id"], "prompt": text, "input_ids": given, "new_ids": new, "min_top2_margin": min(margins)}
