"""Conversion of an ONNX graph with a DINOv2-Small backbone to a transformers `Dinov2Model` folder.

The exporter kept the names of most parameters (`backbone.*`), transposed and renamed the weights of linear layers, and
folded the position embeddings into two constants. A linear weight is found by the name of the node that multiplies with
it, the two constants by the nodes of the embedding that read them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava.errors import CheckpointError, ConfigError
from llava.utils.lookup import require

PREFIX = "backbone."
LINEAR_NODE = re.compile(r"^/backbone/(encoder/layer\.\d+/.+)/MatMul$")
CLASS_POSITION_NODE = "/backbone/embeddings/Concat_6"
PATCH_POSITION_NODE = "/backbone/embeddings/Reshape_1"

POSITIONS = "embeddings.position_embeddings"

PATCH_SIZE = 14
NUM_HEADS = 6
"""Number of heads (of width 64) of DINOv2-Small, which the graph does not store."""

IMAGE_MEAN = [0.485, 0.456, 0.406]
IMAGE_STD = [0.229, 0.224, 0.225]


def convert_onnx(source: Path, target: Path, *, image_size: int) -> None:
    """Write the `Dinov2Model` folder of ONNX file `source` into the existing folder `target`.

    The position embeddings are resampled to `image_size`, so config, weights and image processor agree on one size.

    Args:
        source: the ONNX file.
        target: an existing folder.
        image_size: side of the images in pixels, a multiple of 14.

    Raises:
        ConfigError: `image_size` is not a multiple of the patch size.
        MissingDependency: package onnx is missing.
        CheckpointError: the graph lacks a part of the backbone.
    """
    if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
        raise ConfigError(f"--image-size must be a multiple of {PATCH_SIZE}, got {image_size}")
    onnx = require("onnx", "quickstart")
    graph = onnx.load(str(source)).graph
    state = backbone_state(graph, onnx.numpy_helper.to_array)
    state[POSITIONS] = resampled(state[POSITIONS], image_size // PATCH_SIZE)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    files = {"config.json": dinov2_config(state), "preprocessor_config.json": image_processor(image_size)}
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    check_complete(target, source)


def backbone_state(graph: Any, to_array: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of the backbone by their names in `Dinov2Model`.

    Raises:
        CheckpointError: the nodes that read the position embeddings are missing.
    """
    values = {item.name: torch.tensor(to_array(item)) for item in graph.initializer}
    state = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
    positions: dict[str, torch.Tensor] = {}
    for node in graph.node:
        constants = [values[name] for name in node.input if name in values]
        if node.name in (CLASS_POSITION_NODE, PATCH_POSITION_NODE) and constants:
            positions[node.name] = constants[0]
        linear = LINEAR_NODE.match(node.name)
        if linear and constants:
            state[linear[1].replace("/", ".") + ".weight"] = constants[0].T.contiguous()
    if len(positions) != 2:
        raise CheckpointError(f"the ONNX graph has no constants at {CLASS_POSITION_NODE} and {PATCH_POSITION_NODE}")
    table = [positions[CLASS_POSITION_NODE], positions[PATCH_POSITION_NODE]]
    state[POSITIONS] = torch.cat(table, dim=1).contiguous()
    width = state["embeddings.cls_token"].shape[-1]
    # Used only by masked pre-training, so the graph lacks it.
    state["embeddings.mask_token"] = torch.zeros(1, width)
    return state


def resampled(table: torch.Tensor, side: int) -> torch.Tensor:
    """Return position embeddings [1, 1 + P, D] for `side` x `side` patches, resampled as by the library."""
    old_side = round((table.shape[1] - 1) ** 0.5)
    if old_side == side:
        return table
    grid = table[:, 1:].reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1).contiguous()


def image_processor(image_size: int) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`: resize, center crop, ImageNet mean and std."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }


def dinov2_config(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the content of `config.json` from the shapes of the weights."""
    num_patches = state[POSITIONS].shape[1] - 1
    side = round(num_patches**0.5)
    width = state["embeddings.cls_token"].shape[-1]
    num_layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "mlp_ratio": state["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        "image_size": side * PATCH_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "dtype": "float32",
    }


def check_complete(folder: Path, source: Path) -> None:
    """Check that the library finds every parameter in the written folder, and no other.

    Raises:
        CheckpointError: a parameter is missing, unexpected or of another shape.
    """
    from transformers import Dinov2Model

    loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    report: dict[str, Any] = loaded[1]
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
    if wrong:
        raise CheckpointError(f"{source}: the backbone does not fit Dinov2Model: {wrong}")
