"""Weights that are not finite are refused before anything is answered, by the name of the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from llava import cli
from llava.api import load_predictor
from llava.errors import CheckpointError
from llava.generation.loading import open_engine
from llava.model.builder import LoadedModel
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.finite import check_finite, is_finite
from llava.model.checkpoint.legacy.export import export_legacy
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.lora import add_lora, freeze_for
from tests.support.tiny import write_tiny_vqa

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_value_anywhere(dtype: torch.dtype, value: float) -> None:
    for place in (0, 700, 4095):
        tensor = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
        assert is_finite(tensor) and is_finite(tensor.T) and is_finite(-tensor)
        tensor.view(-1)[place] = value
        assert not is_finite(tensor) and not is_finite(tensor.T)


def test_empty_and_whole_numbers_are_finite() -> None:
    assert is_finite(torch.empty(0, 3)) and is_finite(torch.tensor(1.0))
    check_finite([("a", torch.ones(2, dtype=torch.int8)), ("b", torch.ones(2))], "x")


def spoil(model: nn.Module, name: str, value: float) -> None:
    parameter = next(parameter for found, parameter in model.named_parameters() if name in found)
    with torch.no_grad():
        parameter.view(-1)[3] = value


def adapter(loaded: LoadedModel, folder: Path) -> None:
    network = add_lora(loaded, r=2)
    freeze_for(network, has_adapter=True)
    spoil(network, "layers.1.mlp.up_proj.lora_A", INF)
    save_adapter(network, loaded.processor, folder, origin=loaded.origin)


def projector(loaded: LoadedModel, folder: Path) -> None:
    spoil(loaded.model, "multi_modal_projector.2.bias", NAN)
    save_projector(loaded.model, loaded.processor, folder, origin=loaded.origin)


def model(loaded: LoadedModel, folder: Path) -> None:
    spoil(loaded.model, "layers.1.input_layernorm", NAN)
    save_model(loaded.model, loaded.processor, folder, origin=loaded.origin)


def tower(loaded: LoadedModel, folder: Path) -> None:
    spoil(loaded.model, "vision_tower", -INF)
    export_hf(loaded, folder)


def legacy(loaded: LoadedModel, folder: Path) -> None:
    spoil(loaded.model, "lm_head", NAN)
    export_legacy(loaded, folder)


SPOILED: dict[str, tuple[Callable[[LoadedModel, Path], None], str]] = {
    "model": (model, "layers.1.input_layernorm"),
    "adapter": (adapter, "layers.1.mlp.up_proj"),
    "projector": (projector, "multi_modal_projector.2.bias"),
    "transformers' Llava": (tower, "vision_tower"),
    "legacy": (legacy, "lm_head"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_chat_and_evaluation_refuse_them(tmp_path: Path, built: LoadedModel, kind: str) -> None:
    write, name = SPOILED[kind]
    write(built, tmp_path / "out")
    for load in (open_engine, load_predictor):
        with pytest.raises(CheckpointError, match=r"not finite.*doctor --weights") as caught:
            load(str(tmp_path / "out"), device="cpu")
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_the_evaluation_ends_with_one_line_and_no_results(
    tmp_path: Path, built: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model(built, tmp_path / "out")
    data = write_tiny_vqa(tmp_path / "vqa")
    capsys.readouterr()
    words = ["eval", "--model", str(tmp_path / "out"), "--data", str(data / "train.json")]
    words += ["--image-folder", str(data / "images"), "--out", str(tmp_path / "eval"), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    [line, *_] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "layers.1.input_layernorm.weight holds values that are not finite" in line
    assert not (tmp_path / "eval" / "results.json").exists()


def test_doctor_lists_all_of_them(tmp_path: Path, built: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("multi_modal_projector.0.weight", "layers.0.self_attn.q_proj"):
        spoil(built.model, name, NAN)
    save_model(built.model, built.processor, tmp_path / "out")
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", "doctor", str(tmp_path / "out"), "--weights"])
    found = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(found) == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava_med"
