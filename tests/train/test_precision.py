"""Frozen weights in bf16: losses and checkpoints bitwise equal to autocast, and less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from llava.model.builder import LoadedModel
from llava.model.lora import add_lora, freeze_for
from llava.model.quantization import quantized_layers
from llava.train import precision
from llava.train.args import LlavaTrainingArguments
from tests.support.runs import arguments, losses, saved, train, write_parts
from tests.support.tiny import tiny_llava, write_tiny_lm, write_tiny_tower


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_tiny_tower(folder / "siglip", "siglip")
    write_tiny_tower(folder / "dinov2", "dinov2")
    return folder


held = precision.hold_frozen_in_bf16


def dtypes(network: Any) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in network.named_parameters()}


LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    "options",
    [
        {**LORA, "lora_bias": "all", "eval": True},
        {**LORA, "mm_use_im_start_end": True, "freeze_mm_mlp_adapter": True, "vision_tower": "siglip"},
        {**LORA, "unfreeze_mm_vision_tower": True, "gradient_checkpointing": True},
        {"tune_mm_mlp_adapter": True, "mm_use_im_start_end": True, "vision_tower": "dinov2"},
        {"freeze_backbone": True},
    ],
    ids=["adapter", "adapter-markers", "adapter-tower", "projector-markers", "model"],
)
def test_a_run_computes_and_saves_what_autocast_gives(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    words = {**options, "bf16": True, "vision_tower": parts / options.get("vision_tower", "tower")}
    if words.pop("eval", False):
        words |= {"eval_data_path": parts / "vqa" / "train.json", "eval_answers": 3}
    train(arguments(parts, tmp_path / "autocast", **words))
    monkeypatch.setattr(precision, "stores_frozen_in_bf16", lambda **given: True)
    cast_weights: list[int] = []
    monkeypatch.setattr(precision, "hold_frozen_in_bf16", lambda *given: cast_weights.append(held(*given)) or 0)
    train(arguments(parts, tmp_path / "held", **words))
    assert (cast_weights[0] > 0) == ("freeze_backbone" not in options)
    assert losses(tmp_path / "held") == losses(tmp_path / "autocast")
    assert losses(tmp_path / "held", "grad_norm") == losses(tmp_path / "autocast", "grad_norm")
    for name in ("eval_loss", "eval_open_recall"):
        assert losses(tmp_path / "held", name) == losses(tmp_path / "autocast", name)
    first, second = saved(tmp_path / "autocast"), saved(tmp_path / "held")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (
            tensor.dtype == torch.float32 and torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype
        )


def test_what_is_cast(tiny: LoadedModel) -> None:
    network = add_lora(tiny, r=4, alpha=8)
    freeze_for(network, has_adapter=True)
    num_cast = held(network, "adapter")
    found = dtypes(network)
    in_bf16 = {name for name, dtype in found.items() if dtype == torch.bfloat16}
    assert num_cast == sum(p.numel() for name, p in network.named_parameters() if name in in_bf16)
    linear = {name for name in found if "_proj." in name and "lora_" not in name and name.endswith("weight")}
    assert linear and linear <= in_bf16
    assert any("lm_head" in name for name in in_bf16) and any("patch_embedding" in name for name in in_bf16)
    for name in in_bf16:
        assert name.endswith("weight") and not any(word in name for word in ("lora_", "projector", "norm", "tokens"))


def test_a_head_that_is_the_embedding_table_stays() -> None:
    tied = tiny_llava(tie=True)
    network = add_lora(tied, r=4)
    freeze_for(network, has_adapter=True)
    assert held(network, "adapter") > 0
    assert tied.model.lm_head.weight.dtype == torch.float32
    assert tied.model.lm_head.weight is tied.model.get_input_embeddings().weight


def test_a_whole_model_is_saved_as_it_was(tiny: LoadedModel) -> None:
    freeze_for(tiny.model, freeze_backbone=True)
    assert held(tiny.model, "model") == 0 and set(dtypes(tiny.model).values()) == {torch.float32}


@pytest.mark.parametrize(
    ("bf16", "device", "deepspeed", "fsdp", "expected"),
    [
        (True, "cuda", None, [], True),
        (True, "cpu", None, [], False),
        (False, "cuda", None, [], False),
        (True, "cuda", "zero2.json", [], False),
        (True, "cuda", None, "full_shard", False),
    ],
)
def test_where_it_is_done(bf16: bool, device: str, deepspeed: Any, fsdp: Any, expected: bool) -> None:
    args = LlavaTrainingArguments(output_dir="unused").changed(deepspeed=deepspeed, fsdp=fsdp)
    found = precision.stores_frozen_in_bf16(bf16=bf16, device_type=device, sharded=args.is_sharded)
    assert found is expected


def test_four_bit_layers_compute_in_bf16(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    write_tiny_lm(tmp_path / "lm", hidden_size=64, intermediate_size=128)
    words = {**LORA, "bits": 4, "bf16": True, "lora_dropout": 0.0, "model_name_or_path": tmp_path / "lm"}
    train(arguments(parts, tmp_path / "autocast", **words))
    monkeypatch.setattr(precision, "stores_frozen_in_bf16", lambda **given: True)
    networks: list[Any] = []
    monkeypatch.setattr(precision, "hold_frozen_in_bf16", lambda *given: networks.append(given[0]) or held(*given))
    train(arguments(parts, tmp_path / "held", **words))
    layers = quantized_layers(networks[0])
    assert layers and {cast(Any, layer).compute_dtype for layer in layers} == {torch.bfloat16}
    assert losses(tmp_path / "held") == pytest.approx(losses(tmp_path / "autocast"), rel=1e-2)
    assert all(tensor.dtype == torch.float32 for tensor in saved(tmp_path / "held").values())
