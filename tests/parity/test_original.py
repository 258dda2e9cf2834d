"""Model against recorded batches of the original projects: logits, loss and gradients.

Their checkpoints are taken apart by hand here; what is tested is the model around the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from llava.constants import IGNORE_INDEX
from llava.model.builder import LoadedModel, build_model
from llava.model.checkpoint.load_parts import load_projector
from llava.model.lora import freeze_for

IMAGE_MARK = -200
"""Token id of an image placeholder in the original."""

NUM_WORDS = 640

PREFIXES = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.": "model.multi_modal_projector.",
    "model.": "model.language_model.",
}


def current_name(name: str) -> str:
    """Return our name of a weight in an original checkpoint."""
    for old, new in PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss over the original's vocabulary, which lacks our placeholder."""
    return cross_entropy(logits[:, :-1, :NUM_WORDS].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def original(folder: Path) -> LoadedModel:
    """Return a model of the parts of LLaVA 1.2.2's runs."""
    loaded = build_model(
        str(folder / "base_llm"), str(folder / "vision_tower"), projector_type="mlp2x_gelu", image_mode="pad"
    )
    loaded.model.eval()
    return loaded


def take(loaded: LoadedModel, weights: Mapping[str, Tensor]) -> None:
    """Copy original weights into the model; the row of our placeholder stays."""
    state = loaded.model.state_dict()
    taken = set()
    for old, tensor in weights.items():
        name = current_name(old)
        state[name][: tensor.shape[0]].copy_(tensor)
        taken.add(name)
    assert taken == set(state)


def recorded(folder: Path, loaded: LoadedModel, batch: str) -> dict[str, Any]:
    """Return a recorded batch with expanded placeholders and preprocessed images."""
    arrays = np.load(folder / "forward.npz")
    ids, labels = arrays[f"{batch}/input_ids"], arrays[f"{batch}/in_labels"]
    mask = arrays[f"{batch}/in_attention_mask"]
    num, token = loaded.processor.num_image_tokens, loaded.processor.image_token_id
    rows: list[list[tuple[int, int]]] = []
    for row_ids, row_labels, row_mask in zip(ids, labels, mask, strict=True):
        row: list[tuple[int, int]] = []
        for token_id, label in zip(row_ids[row_mask], row_labels[row_mask], strict=True):
            row += [(token, IGNORE_INDEX)] * num if token_id == IMAGE_MARK else [(int(token_id), int(label))]
        rows.append(row)
    longest = max(map(len, rows))
    padded = [row + [(0, IGNORE_INDEX)] * (longest - len(row)) for row in rows]
    pairs = torch.tensor(padded)
    records = {record["id"]: record for record in json.loads((folder / "data.json").read_text())}
    names = json.loads((folder / "forward_meta.json").read_text())[batch]["ids"]
    images = [
        Image.open(folder / "images" / records[n]["image"]).convert("RGB") for n in names if "image" in records[n]
    ]
    return {
        "input_ids": pairs[..., 0],
        "labels": pairs[..., 1],
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "pixel_values": loaded.processor.pixels(images),
    }


@pytest.mark.parametrize("batch", ["batch_a", "batch_b"])
def test_logits_and_loss_of_llava(shared: Path, batch: str) -> None:
    folder = shared / "oracles" / "llava-1.2.2"
    loaded = original(folder)
    take(loaded, load_file(folder / "out" / "stage2" / "model.safetensors"))
    inputs = recorded(folder, loaded, batch)
    with torch.no_grad():
        output = loaded.model(**inputs)
    arrays = np.load(folder / "forward.npz")
    mask = inputs["attention_mask"].bool()
    length = int(arrays[f"{batch}/spliced_mask"].shape[1])
    if mask.shape[1] == length:
        assert np.array_equal(mask.numpy(), arrays[f"{batch}/spliced_mask"])
        assert np.array_equal(inputs["labels"].numpy(), arrays[f"{batch}/spliced_labels"])
    logits, kept = output.logits[:, :length:7, :NUM_WORDS], mask[:, :length:7]
    expected = torch.from_numpy(arrays[f"{batch}/logits_stride7"])
    assert (logits - expected)[kept].abs().max() < 2e-5
    if mask.shape[1] == length:
        assert float(loss_of(output.logits, inputs["labels"])) == pytest.approx(
            float(arrays[f"{batch}/loss"]), abs=1e-5
        )


def test_gradients_of_llava(shared: Path) -> None:
    folder = shared / "oracles" / "llava-1.2.2"
    loaded = original(folder)
    take(loaded, load_file(folder / "out" / "stage2" / "model.safetensors"))
    freeze_for(loaded.model)
    inputs = recorded(folder, loaded, "batch_a")
    loss_of(loaded.model(**inputs).logits, inputs["labels"]).backward()
    gradients = {name: parameter.grad for name, parameter in loaded.model.named_parameters()}
    expected = json.loads((folder / "grads.json").read_text())["grad_norms"]
    compared = 0
    for old, norm in expected.items():
        gradient = gradients[current_name(old)]
        if gradient is None:
            assert not norm
            continue
        rows = gradient[:NUM_WORDS] if old in ("model.embed_tokens.weight", "lm_head.weight") else gradient
        assert float(rows.norm()) == pytest.approx(norm, rel=2e-4), old
        compared += 1
    assert compared > 20


def test_adapter_of_llava(shared: Path) -> None:
    """The original's LoRA run, with its adapter added by the formula, gives the recorded logits."""
    folder = shared / "oracles" / "llava-1.2.2"
    loaded = original(folder)
    load_projector(loaded.model, folder / "out" / "llava-lora" / "non_lora_trainables.bin")
    state = loaded.model.state_dict()
    adapter = load_file(folder / "out" / "llava-lora" / "adapter_model.safetensors")
    for name, down in adapter.items():
        if ".lora_A." in name:
            up = adapter[name.replace(".lora_A.", ".lora_B.")]
            target = current_name(name.removeprefix("base_model.model.").replace(".lora_A.", "."))
            state[target] += 8 / 4 * up @ down
    inputs = recorded(folder, loaded, "batch_a")
    with torch.no_grad():
        output = loaded.model(**inputs)
    arrays = np.load(folder / "lora_forward.npz")
    kept = inputs["attention_mask"][:, ::7].bool()
    expected = torch.from_numpy(arrays["logits_stride7"])
    assert (output.logits[:, ::7, :NUM_WORDS] - expected)[kept].abs().max() < 2e-5
    assert float(loss_of(output.logits, inputs["labels"])) == pytest.approx(float(arrays["loss"]), abs=1e-5)


def test_projector_file_of_llava(shared: Path) -> None:
    folder = shared / "oracles" / "llava-1.2.2"
    loaded = original(folder)
    load_projector(loaded.model, folder / "out" / "stage1" / "mm_projector.bin")
    saved = torch.load(folder / "out" / "stage1" / "mm_projector.bin", weights_only=True)
    state = loaded.model.model.multi_modal_projector.state_dict()
    assert len(saved) == len(state) == 4
    assert all(torch.equal(state[name.removeprefix("model.mm_projector.")], tensor) for name, tensor in saved.items())


def test_projector_file_of_llava_med(shared: Path) -> None:
    """Version 1.0 saves the whole input table; its last two rows are those of the markers."""
    folder = shared / "oracles" / "llava-med-1.0"
    loaded = build_model(str(folder / "base_llm"), str(folder / "vision_tower"), use_im_start_end=True)
    before = loaded.model.get_input_embeddings().weight.detach().clone()
    load_projector(loaded.model, folder / "out" / "stage1" / "mm_projector.bin")
    table = torch.load(folder / "out" / "stage1" / "mm_projector.bin", weights_only=True)["model.embed_tokens.weight"]
    after = loaded.model.get_input_embeddings().weight
    assert loaded.model.config.marker_token_ids == [640, 641]
    assert torch.equal(after[[640, 641]], table[[642, 643]])
    assert torch.equal(after[:NUM_WORDS], before[:NUM_WORDS])
