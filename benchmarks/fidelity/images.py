"""Checks of recorded pixels, hidden states of a tower, and values of the cluster projector."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.fidelity.folder import Differences, Line, Oracle, mismatches, within
from benchmarks.fidelity.gradient_terms import gradient_terms
from benchmarks.fidelity.published import counted_patches
from benchmarks.fidelity.ties import closest
from llava.imaging.anyres import Size, best_size, keep_size, parse_pinpoints
from llava.imaging.geometry import fit_image, mean_color
from llava.model.multimodal_projector import ClusterProjector
from llava.processing import LlavaMedProcessor

PIXEL_TOLERANCE = 1e-6
STATE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 5e-6
"""Tolerance of gradient norms, relative to the norm of the absolute sums of their terms.

Assignments of the cluster projector start nearly even, so the terms of the gradient of the bias before them almost
cancel; its rounding is that of the terms and differs between CPUs by 1.1e-5 of the remainder. Two runs of sums of about
1,500 terms (widths, centers and positions in sequence) differ by 2 * 2^-24 * sqrt(1500) of the terms.
"""

MODES = {"none": "square", "": "square", "pad_lo": "pad", "pad_hi": "pad"}
"""Our image mode for each recorded mode with another name."""

SHIFTED = "pad_hi"
"""Padding that only an original makes; it draws between this one and `pad_lo`."""

GRAY_SUFFIX = "_Lmode"
"""Suffix of recorded modes in which a gray image was passed without conversion."""

COUNTS = "keep_n_patch_tokens"
"""Prefix of the names of recorded numbers of tokens."""

SIZES_IN_README = "grid pinpoints"
"""Text before the recorded tile sizes in the description of the folder."""


def preprocessing(oracle: Oracle) -> Iterator[Line]:
    """Compare `image_preprocess.npz`: arrays `MODE/FILE`, or `FILE` alone."""
    arrays = oracle.arrays("image_preprocess.npz")
    for mode, names in _by_mode(arrays).items():
        prefix = f"{mode}/" if mode else ""
        if mode == COUNTS:
            yield _counts(oracle, {name: int(arrays[prefix + name]) for name in names})
        else:
            yield _pixels(oracle, mode, {name: arrays[prefix + name] for name in names})


def _by_mode(keys: Iterable[str]) -> dict[str, list[str]]:
    modes: dict[str, list[str]] = {}
    for key in keys:
        mode, _, name = key.rpartition("/")
        modes.setdefault(mode, []).append(name)
    return modes


def _pixels(oracle: Oracle, way: str, recorded: dict[str, Any]) -> Line:
    """Compare the images of one mode; names of `llava.compat` may explain a difference."""
    found, explained = Differences(), Counter[str]()
    mode = way.removesuffix(GRAY_SUFFIX)
    processor = processor_in(oracle, MODES.get(mode, mode))
    for name, theirs in recorded.items():
        with Image.open(oracle.path / "images" / name) as image:
            ours = processor.preprocess(image).numpy()
            reasons, original = _as_published(processor, image, way)
        if not _is_near(ours, theirs) and _is_near(original, theirs) and reasons <= oracle.compat:
            ours = original
            explained.update(reasons)
        found.add(ours, theirs)
    note = ", ".join([f"{len(recorded)} images", *(f"{count} {reason}" for reason, count in explained.items())])
    name = f"image preprocessing {way}".rstrip()
    return within(name, found.largest, PIXEL_TOLERANCE, note, count=found.num_compared)


def _is_near(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() <= PIXEL_TOLERANCE)


def _as_published(processor: LlavaMedProcessor, image: Image.Image, way: str) -> tuple[frozenset[str], np.ndarray]:
    """Return the names of the defects of an original mode, and its pixels of an image."""
    reasons, fill = set(), mean_color(processor.image_processor.image_mean)
    if way.startswith(SHIFTED):
        reasons.add("random_padding")
    if way.endswith(GRAY_SUFFIX):
        reasons.add("grey_padding")
        fill = (round(sum(fill) / len(fill)),) * 3
    mode = processor.image_mode if processor.image_mode != "anyres" else "square"
    shaped = fit_image(image, mode, size=processor.image_size, fill=fill, shift="random_padding" in reasons)
    pixels: np.ndarray = processor.image_processor(images=[shaped], return_tensors="np")["pixel_values"][0]
    return frozenset(reasons), pixels


def processor_in(oracle: Oracle, mode: str) -> LlavaMedProcessor:
    """Return the processor of the folder's first model in an image mode, with the folder's tile sizes."""
    sizes = pinpoints(oracle) if mode == "anyres" else None
    return _loaded(oracle).processor.changed(image_mode=mode, image_grid_pinpoints=sizes)


def pinpoints(oracle: Oracle) -> list[Size] | None:
    """Return the sizes of tilings: of a model's configuration, else of the folder's description."""
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in oracle.models]
    if given := [config["image_grid_pinpoints"] for config in configs if config.get("image_grid_pinpoints")]:
        return list(parse_pinpoints(given[0], 0))
    text = (oracle.path / "README.md").read_text(encoding="utf-8") if oracle.has("README.md") else ""
    sizes = re.findall(r"(\d+)x(\d+)", text.partition(SIZES_IN_README)[2].partition("\n")[0])
    return [(int(width), int(height)) for width, height in sizes] or None


def tile_grids(oracle: Oracle) -> Iterator[Line]:
    """Compare `anyres.json`: for each image the chosen size, and the columns and rows of its tiles."""
    wrong = []
    processor = processor_in(oracle, "anyres")
    grid = processor.image_grid
    for name, recorded in oracle.json("anyres.json").items():
        size = _size(oracle, name)
        if (list(best_size(size, grid.pinpoints)), list(grid.shape(size))) != (recorded["best"], recorded["grid"]):
            wrong.append(name)
    num = len(oracle.json("anyres.json"))
    yield mismatches("tile grids", wrong, f"{num} images", count=num)


def kept_shapes(oracle: Oracle) -> Iterator[Line]:
    """Compare `image_keep_shapes.json`: shape of pixels and number of tokens in mode `keep`."""
    recorded, wrong, shapes = oracle.json("image_keep_shapes.json"), [], 0
    processor = processor_in(oracle, "keep")
    for key, shape in recorded.items():
        mode, _, name = key.rpartition("/")
        if mode == COUNTS:
            continue
        shapes += 1
        with Image.open(oracle.path / "images" / name) as image:
            wrong += [] if list(processor.preprocess(image).shape) == shape else [name]
    yield mismatches("shapes of mode keep", wrong, f"{shapes} images", count=shapes)
    if counts := {key.rpartition("/")[2]: num for key, num in recorded.items() if key.startswith(COUNTS)}:
        yield _counts(oracle, counts)


def _counts(oracle: Oracle, recorded: dict[str, int]) -> Line:
    """Compare numbers of tokens in mode `keep`; ours are the patches that the tower gets."""
    found, wrong = Counter[str](), []
    processor = processor_in(oracle, "keep")
    for name, theirs in recorded.items():
        size = _size(oracle, name)
        width, height = keep_size(size)
        if processor.image_grid.count(size) == theirs:
            found["equal"] += 1
        elif "counted_patches" in oracle.compat and counted_patches(width, height, processor) == theirs:
            found["counted_patches"] += 1
        else:
            wrong.append(name)
    note = ", ".join(f"{count} {what}" for what, count in found.items())
    return mismatches("tokens in mode keep", wrong, note, count=len(recorded))


def _size(oracle: Oracle, name: str) -> Size:
    with Image.open(oracle.path / "images" / name) as image:
        return image.size


def _loaded(oracle: Oracle) -> Any:
    return oracle.loaded(oracle.with_weights[0])


def tower(oracle: Oracle) -> Iterator[Line]:
    """Compare `tower.npz`: all hidden states of each image, and the patches that the projector gets."""
    arrays, loaded = oracle.arrays("tower.npz"), _loaded(oracle)
    states, selected = Differences(), Differences()
    network = loaded.model.model.vision_tower
    for number, name in enumerate(arrays["names"]):
        with Image.open(oracle.path / "images" / str(name)) as image, torch.no_grad():
            pixels = loaded.processor.pixels([image])
            output = network(pixels, output_hidden_states=True)
            states.add(torch.stack(output.hidden_states)[:, 0].numpy(), arrays["hidden_states"][:, number])
            selected.add(loaded.model.tower_features(pixels)[0].numpy(), arrays["selected_patch"][number])
    yield states.line("tower hidden states", STATE_TOLERANCE)
    yield selected.line("tower features", STATE_TOLERANCE)


def cluster_projector(oracle: Oracle) -> Iterator[Line]:
    """Compare `cluster_projector.npz`: output and gradients of each configuration."""
    arrays = oracle.arrays("cluster_projector.npz")
    for name in dict.fromkeys(key.split("/", 1)[0] for key in arrays):
        vision, text, num_centers, num_iters, *sizes = arrays[f"{name}/cfg"].tolist()
        given = arrays[f"{name}/x"]
        if sizes and sizes != [given.shape[1], given.shape[0]]:
            raise ValueError(f"{name}: the input has shape {given.shape}, the recorded tokens and rows are {sizes}")
        projector = ClusterProjector(vision, text, num_centers=num_centers, num_iters=num_iters)
        prefix = f"{name}/w/"
        weights = {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}
        projector.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
        projector = closest(projector, torch.from_numpy(given), torch.from_numpy(arrays[f"{name}/out"]))
        values, norms = Differences(), Differences()
        with gradient_terms(projector) as terms:
            output = projector(torch.from_numpy(given))
            (output**2).sum().backward()
        values.add(output.detach().numpy(), arrays[f"{name}/out"])
        largest = max(float(p.grad.norm()) for p in projector.parameters() if p.grad is not None)
        for key, parameter in projector.named_parameters():
            if f"{name}/grad_none/{key}" in arrays:
                norms.add(int(parameter.grad is None), arrays[f"{name}/grad_none/{key}"])
                continue
            recorded = float(arrays[f"{name}/grad_norm/{key}"])
            mine = np.nan if parameter.grad is None else float(parameter.grad.norm())
            # A single center gets all weight whatever its similarity, so gradients before it are exactly zero.
            size = float(terms[key].norm()) if key in terms else recorded
            size = size or largest
            norms.add(mine / size, recorded / size)
        yield values.line(f"cluster projector {name}", PIXEL_TOLERANCE)
        what = "norms, relative to their terms"
        yield norms.line(f"cluster projector gradients {name}", GRADIENT_TOLERANCE, what)
