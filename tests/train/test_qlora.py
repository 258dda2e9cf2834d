"""QLoRA on the CPU: quantized weights are unchanged, and adapters train, also after validation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from llava.model.checkpoint.load import load_checkpoint
from llava.model.quantization import quantized_layers
from llava.train.model import open_model
from llava.train.parsing import parse_training_args
from tests.support.runs import arguments, losses, train
from tests.support.tiny import tiny_llava, write_tiny_lm, write_tiny_tower, write_tiny_vqa

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose layers are wide enough for blocks of 64 values."""
    folder = tmp_path_factory.mktemp("parts")
    write_tiny_lm(folder / "lm", hidden_size=64, intermediate_size=128)
    write_tiny_tower(folder / "tower")
    write_tiny_vqa(folder / "vqa")
    return folder


def test_adapters_learn_before_and_after_validation(parts: Path, tmp_path: Path) -> None:
    options = {"bits": 4, "lora_enable": True, "lora_r": 4, "lora_dropout": 0.0, "num_train_epochs": 4}
    options |= {"eval_data_path": parts / "vqa" / "train.json", "learning_rate": 1e-2, "freeze_mm_mlp_adapter": True}
    train(arguments(parts, tmp_path, **options))
    found, checked = losses(tmp_path), losses(tmp_path, "eval_loss")
    assert len(found) == 12 and len(checked) == 4
    assert all(later < earlier for earlier, later in pairwise(checked))
    assert all(norm > 0 for norm in losses(tmp_path, "grad_norm"))
    loaded = load_checkpoint(tmp_path, bits=4, merge=False)
    adapters = {name: tensor for name, tensor in loaded.model.state_dict().items() if "lora_B" in name}
    assert adapters and all(tensor.any() for tensor in adapters.values())


def test_a_quantized_model_is_put_together(parts: Path) -> None:
    loaded = tiny_llava(bits=4)
    names = {type(layer).__name__ for layer in quantized_layers(loaded.model)}
    assert names == {"Linear4bit"} and len(quantized_layers(loaded.model)) == 14
    assert isinstance(loaded.model.model.multi_modal_projector[0], torch.nn.Linear)
    assert not quantized_layers(loaded.model.model.vision_tower)


def test_the_form_of_quantization_is_the_one_asked_for(parts: Path, tmp_path: Path) -> None:
    options = {"bits": 4, "lora_enable": True, "lora_r": 4, "max_steps": 1, "quant_type": "fp4", "double_quant": False}
    parsed = parse_training_args(arguments(parts, tmp_path, **options))
    loaded = open_model(parsed.model_spec())
    states = [cast(Any, layer).weight.quant_state for layer in quantized_layers(loaded.model)]
    assert states and all(state.quant_type == "fp4" and not state.nested for state in states)
