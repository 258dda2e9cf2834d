"""ONNX conversion of a hand-made graph; the real file is tested in test_pretrained.py."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

from llava.errors import CheckpointError, ConfigError
from llava.model.packaged import vit_small

WIDTH, SIDE, LAYERS = 24, 5, 2


def tiny_backbone() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=vit_small.NUM_HEADS,
        mlp_ratio=4,
        image_size=SIDE * 14,
        patch_size=14,
    )
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_graph(path: Path, folder: Path, *, positions: bool = True) -> Dinov2Model:
    """Write a graph as the exporter does: named vectors, numbered and transposed linear weights."""
    model = tiny_backbone()
    model.save_pretrained(folder)
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    constants, nodes = [], []
    for number, (name, value) in enumerate(state.items()):
        if name == vit_small.POSITIONS:
            parts = {"Concat_6": value[:, :1], "Reshape_1": value[:, 1:]}
            for node, part in parts.items() if positions else ():
                constants.append(numpy_helper.from_array(part.contiguous().numpy(), f"onnx::{node}"))
                nodes.append(
                    helper.make_node("Identity", [f"onnx::{node}"], [node], name=f"/backbone/embeddings/{node}")
                )
        elif value.ndim == 2 and name.startswith("encoder.") and name.endswith(".weight"):
            constants.append(numpy_helper.from_array(value.T.contiguous().numpy(), f"onnx::MatMul_{number}"))
            node = "/backbone/" + name.removesuffix(".weight").replace(".layer.", "/layer#").replace(".", "/")
            node = node.replace("/layer#", "/layer.") + "/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], [f"y{number}"], name=node))
        elif name != "embeddings.mask_token":
            constants.append(numpy_helper.from_array(value.numpy(), "backbone." + name))
    graph = helper.make_graph(nodes, "tiny", [], [], constants)
    onnx.save(helper.make_model(graph), str(path))
    return model


def test_a_converted_graph_computes_what_the_model_computed(tmp_path: Path) -> None:
    model = write_graph(tmp_path / "tiny.onnx", tmp_path / "source")
    (tmp_path / "out").mkdir()
    vit_small.convert_onnx(tmp_path / "tiny.onnx", tmp_path / "out", image_size=SIDE * 14)
    pixels = torch.randn(2, 3, SIDE * 14, SIDE * 14)
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path / "out")(pixels).last_hidden_state
        torch.testing.assert_close(again, model(pixels).last_hidden_state, rtol=0, atol=1e-5)


def test_another_size_computes_what_the_library_interpolates(tmp_path: Path) -> None:
    model = write_graph(tmp_path / "tiny.onnx", tmp_path / "source")
    (tmp_path / "out").mkdir()
    vit_small.convert_onnx(tmp_path / "tiny.onnx", tmp_path / "out", image_size=42)
    small = AutoModel.from_pretrained(tmp_path / "out")
    pixels = torch.randn(1, 3, 42, 42)
    with torch.no_grad():
        torch.testing.assert_close(small(pixels)[0], model(pixels)[0], rtol=0, atol=1e-4)
    assert small.config.image_size == 42
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert dict(processor.crop_size) == {"height": 42, "width": 42}


@pytest.mark.parametrize("size", [0, 100, 7])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 14"):
        vit_small.convert_onnx(tmp_path / "absent.onnx", tmp_path, image_size=size)


def test_a_graph_without_positions_is_refused(tmp_path: Path) -> None:
    write_graph(tmp_path / "tiny.onnx", tmp_path / "source", positions=False)
    with pytest.raises(CheckpointError, match="no constants"):
        vit_small.convert_onnx(tmp_path / "tiny.onnx", tmp_path, image_size=14)


def test_a_missing_parameter_is_refused(tmp_path: Path) -> None:
    write_graph(tmp_path / "tiny.onnx", tmp_path / "source")
    proto = onnx.load(str(tmp_path / "tiny.onnx"))
    kept = [item for item in proto.graph.initializer if item.name != "backbone.layernorm.bias"]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    onnx.save(proto, str(tmp_path / "tiny.onnx"))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"layernorm\.bias"):
        vit_small.convert_onnx(tmp_path / "tiny.onnx", tmp_path / "out", image_size=14)
