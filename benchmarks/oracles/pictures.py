"""Recorded pixels, hidden states of a tower, and values of the cluster projector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.oracles.folder import Differences, Line, Oracle, loaded_from, within
from llava.model.cluster_projector import ClusterProjector

PIXEL_TOLERANCE = 1e-6
STATE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
"""Of gradient norms, relative."""

MODES = {"square": "square", "none": "square", "": "square", "pad": "pad", "pad_lo": "pad"}
"""Our image mode for each recorded way; `pad_lo` is one of two paddings between which an original draws."""

NOT_MATCHED = {
    "pad_hi": "the original draws the offset of an odd padding; ours always rounds down, which is pad_lo",
    "anyres": "tiles of one picture (image mode anyres) are not built yet",
    "keep": "pictures of any shape (image mode keep) are not built yet",
    "keep_n_patch_tokens": "pictures of any shape (image mode keep) are not built yet",
}
GREY = "_Lmode"
"""Ends the name of a way in which a grey picture was passed without conversion."""


def preprocessing(oracle: Oracle) -> Iterator[Line]:
    """`image_preprocess.npz`: arrays `MODE/FILE`, or `FILE` alone."""
    arrays, ways = oracle.arrays("image_preprocess.npz"), {}
    for key in arrays.files:
        mode, _, name = key.rpartition("/")
        ways.setdefault(mode, []).append((key, name))
    processor = _loaded(oracle).processor
    usual = processor.image_mode
    for mode, keys in ways.items():
        quantity = f"image preprocessing {mode}".rstrip()
        if mode.removesuffix(GREY) in NOT_MATCHED:
            yield Line(quantity, None, "skipped", NOT_MATCHED[mode.removesuffix(GREY)])
            continue
        found = Differences()
        processor.use_image_mode(MODES[mode.removesuffix(GREY)])
        for key, name in keys:
            with Image.open(oracle.path / "images" / name) as picture:
                found.add(processor.pixels([picture])[0].numpy(), arrays[key])
        processor.use_image_mode(usual)
        yield within(quantity, found.largest, PIXEL_TOLERANCE, f"{len(keys)} pictures")


def _loaded(oracle: Oracle) -> Any:
    return loaded_from(oracle.path, str(oracle.models[0].relative_to(oracle.path)))


def tower(oracle: Oracle) -> Iterator[Line]:
    """`tower.npz`: all hidden states of each picture, and the patches that the projector gets."""
    arrays, loaded = oracle.arrays("tower.npz"), _loaded(oracle)
    states, selected = Differences(), Differences()
    network = loaded.model.model.vision_tower
    for number, name in enumerate(arrays["names"]):
        with Image.open(oracle.path / "images" / str(name)) as picture, torch.no_grad():
            pixels = loaded.processor.pixels([picture])
            output = network(pixels, output_hidden_states=True)
            states.add(torch.stack(output.hidden_states)[:, 0].numpy(), arrays["hidden_states"][:, number])
            selected.add(loaded.model.tower_features(pixels)[0].numpy(), arrays["selected_patch"][number])
    yield within("tower hidden states", states.largest, STATE_TOLERANCE, f"{states.num_compared} values")
    yield within("tower features", selected.largest, STATE_TOLERANCE, f"{selected.num_compared} values")


def cluster_projector(oracle: Oracle) -> Iterator[Line]:
    """`cluster_projector.npz`: output and gradients of each configuration."""
    arrays = oracle.arrays("cluster_projector.npz")
    for name in dict.fromkeys(key.split("/", 1)[0] for key in arrays.files):
        vision, text, num_centers, num_iters, *_ = arrays[f"{name}/cfg"].tolist()
        projector = ClusterProjector(vision, text, num_centers=num_centers, num_iters=num_iters)
        prefix = f"{name}/w/"
        weights = {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}
        projector.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
        values, norms = Differences(), Differences()
        output = projector(torch.from_numpy(arrays[f"{name}/x"]))
        values.add(output.detach().numpy(), arrays[f"{name}/out"])
        (output**2).sum().backward()
        for key, parameter in projector.named_parameters():
            if f"{name}/grad_none/{key}" in arrays.files:
                norms.add(int(parameter.grad is None), 1)
                continue
            recorded = float(arrays[f"{name}/grad_norm/{key}"])
            mine = np.nan if parameter.grad is None else float(parameter.grad.norm())
            norms.add(mine / recorded, 1.0)
        yield within(f"cluster projector {name}", values.largest, PIXEL_TOLERANCE, f"{values.num_compared} values")
        note = f"{norms.num_compared} norms, relative"
        yield within(f"cluster projector gradients {name}", norms.largest, GRADIENT_TOLERANCE, note)
