"""4 and 8 bits: what is quantized, and that adapters still train after an evaluation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava.errors import ConfigError
from llava.model.builder import build_model
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.legacy.export import export_legacy
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.lora import add_lora, freeze_for, trainable_report
from llava.model.quantization import Quantization, quantized_layers
from tests.support.model_tools import batch, logits, shake, trained
from tests.support.tiny import tiny_llava, write_tiny_lm, write_tiny_tower

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: train)"
)

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
"""bitsandbytes evaluates 4-bit layers on the CPU only where widths are multiples of its block of 64 weights."""


def test_16_bits_need_no_configuration() -> None:
    assert Quantization().config(torch.float32) is None


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (Quantization(5), "bits is 5; expected 4, 8 or 16"),
        (Quantization(4, quant_type="int4"), "quant_type is 'int4'; expected nf4 or fp4"),
    ],
)
def test_wrong_settings_are_rejected(quantization: Quantization, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantization.config(torch.float32)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_language_models_layers_are_quantized(bits: int) -> None:
    loaded = tiny_llava(bits=bits, lm_sizes=WIDE)
    quantized = {name for name, module in loaded.model.named_modules() if module in set(quantized_layers(loaded.model))}
    assert len(quantized) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in quantized)
    exact = logits(tiny_llava(lm_sizes=WIDE))
    difference = (logits(loaded) - exact).abs().mean() / exact.abs().mean()
    assert 1e-4 < difference < (0.35 if bits == 4 else 0.05)


@needs_bitsandbytes
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_get_gradients_after_an_evaluation(checkpointing: bool) -> None:
    """A 4-bit layer that runs once in evaluation mode on the CPU permanently loses its gradient."""
    loaded = tiny_llava(bits=4, lm_sizes=WIDE)
    network = add_lora(loaded, r=4, dropout=0.0)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    if checkpointing:
        loaded.model.enable_input_require_grads()
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {**batch(loaded), "use_cache": False}

    def gradients() -> dict[str, torch.Tensor]:
        network.train()
        network.zero_grad()
        network(**inputs).loss.backward()
        return {name: p.grad.clone() for name, p in trained(network).items() if p.grad is not None}

    before = gradients()
    assert before.keys() == trained(network).keys()
    assert any("lora_A" in name and gradient.abs().max() > 0 for name, gradient in before.items())
    network.eval()
    with torch.no_grad():
        network(**inputs)
        loaded.model.generate(
            input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], max_new_tokens=3, pad_token_id=0
        )
    after = gradients()
    assert after.keys() == before.keys()
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name


@needs_bitsandbytes
def test_evaluation_mode_reaches_everything_but_quantized_layers() -> None:
    loaded = tiny_llava(bits=4)
    network = add_lora(loaded, dropout=0.5)
    network.train()
    network.eval()
    dropouts = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    assert dropouts
    assert not any(module.training for module in dropouts)
    assert all(layer.training for layer in quantized_layers(network))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Return a saved model of full precision, and its logits."""
    loaded = tiny_llava(lm_sizes=WIDE, use_im_start_end=True)
    save_model(loaded.model, loaded.processor, tmp_path / "model")
    return tmp_path / "model", logits(loaded)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_saved_models_are_quantized_while_loading(saved: tuple[Path, torch.Tensor], bits: int) -> None:
    folder, exact = saved
    loaded = load_checkpoint(folder, bits=bits)
    names = {name for name, module in loaded.model.named_modules() if module in set(quantized_layers(loaded.model))}
    assert len(names) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert 0 < (logits(loaded) - exact).abs().mean() < 0.35 * exact.abs().mean()


@needs_bitsandbytes
def test_adapter_of_a_quantized_model(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """An adapter trained and loaded on 4 bits has the same logits, and close ones on full precision."""
    quantized = load_checkpoint(saved[0], bits=4)
    network = add_lora(quantized, r=4)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    network.eval()
    save_adapter(network, quantized.processor, tmp_path / "adapter", origin=quantized.origin)
    expected = logits(quantized)
    again = load_checkpoint(tmp_path / "adapter", bits=4, merge=False)
    again.model.eval()
    torch.testing.assert_close(logits(again), expected)
    full = logits(load_checkpoint(tmp_path / "adapter"))
    assert (full - expected).abs().mean() < 0.5 * (saved[1] - expected).abs().mean()


def quantized_names(loaded: Any) -> set[str]:
    layers = set(quantized_layers(loaded.model))
    return {name for name, module in loaded.model.named_modules() if module in layers}


def close(loaded: Any, exact: torch.Tensor) -> bool:
    return bool(0 < (logits(loaded) - exact).abs().mean() < 0.35 * exact.abs().mean())


@pytest.fixture(scope="module")
def other_formats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Write a model in the legacy format (one file and shards) and in transformers'; return its logits too."""
    root = tmp_path_factory.mktemp("formats")
    loaded = tiny_llava(lm_sizes=WIDE, projector_type="mlp2x_gelu")
    export_legacy(loaded, root / "legacy")
    export_legacy(loaded, root / "legacy bin shards", safe=False, max_shard_bytes=100_000)
    export_hf(loaded, root / "hf")
    return root, logits(loaded)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["legacy", "legacy bin shards", "hf"])
def test_checkpoints_of_other_formats_are_quantized_while_loading(
    other_formats: tuple[Path, torch.Tensor], form: str, bits: int
) -> None:
    folder, exact = other_formats
    loaded = load_checkpoint(folder / form, bits=bits)
    names = quantized_names(loaded)
    assert len(names) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names)
    plain = load_checkpoint(folder / form)
    for name, weight in plain.model.named_parameters():  # everything that is not quantized is bitwise equal
        if name.rsplit(".", 1)[0] not in names:
            assert torch.equal(loaded.model.get_parameter(name), weight), name
    assert close(loaded, exact)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_and_projectors_of_other_formats_on_a_quantized_model(tmp_path: Path, bits: int) -> None:
    """Legacy adapters stay adapters there: they cannot be merged into quantized weights."""
    write_tiny_lm(tmp_path / "parts" / "lm", **WIDE)
    write_tiny_tower(tmp_path / "parts" / "tower")
    loaded = build_model(str(tmp_path / "parts" / "lm"), str(tmp_path / "parts" / "tower"), projector_type="mlp2x_gelu")
    save_projector(loaded.model, loaded.processor, tmp_path / "projector", origin=loaded.origin)
    convert_checkpoint(tmp_path / "projector", tmp_path / "legacy projector", "legacy")
    base = str(tmp_path / "parts" / "lm")
    alone = load_checkpoint(tmp_path / "legacy projector", base=base, template="vicuna_v1", bits=bits)
    assert len(quantized_names(alone)) == 2 * 7
    before = logits(loaded)
    assert close(alone, before)
    network = add_lora(loaded, r=4, alpha=8)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    network.eval()
    save_adapter(network, loaded.processor, tmp_path / "adapter", origin=loaded.origin)
    convert_checkpoint(tmp_path / "adapter", tmp_path / "legacy adapter", "legacy")
    adapted = load_checkpoint(tmp_path / "legacy adapter", base=base, bits=bits)
    assert any("lora_A" in name for name, _ in adapted.model.named_parameters())
    adapted.model.eval()
    full = logits(loaded)
    assert 0 < (logits(adapted) - full).abs().mean() < 0.6 * (before - full).abs().mean()


@needs_bitsandbytes
def test_report_counts_weights_not_bytes() -> None:
    full, packed = (trainable_report(tiny_llava(bits=bits).model).splitlines()[-1].split()[2] for bits in (16, 4))
    assert full == packed
