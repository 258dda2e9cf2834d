"""LoRA as peft has it: chosen layers, scales, DoRA, starts, modules trained in full; saved and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import ConfigError
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter
from llava.model.lora import add_lora, freeze_for
from llava.train.parsing import parse_training_args
from tests.support.model_tools import logits, shake, trained
from tests.support.runs import arguments, write_parts
from tests.support.tiny import tiny_llava


def adapted(**options: Any) -> set[str]:
    """Return the last names of the layers that got an adapter."""
    network = add_lora(tiny_llava(), r=4, alpha=8, **options)
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in network.named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["self_attn.k_proj"], {"k_proj"}),
        ([r".*\.layers\.0\..*(gate|up)_proj"], {"gate_proj", "up_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_layers_are_chosen_by_name(targets: list[str] | None, expected: set[str]) -> None:
    assert adapted(targets=targets) == expected


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["qproj"], "--lora-target-modules qproj: no linear layer .* expected one or more of down_proj, gate_proj"),
        (["fc1"], "no linear layer of the language model"),
        (["q_(proj"], "not a regular expression"),
    ],
)
def test_a_wrong_name_lists_the_layers(targets: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        adapted(targets=targets)


@pytest.mark.parametrize("name", ["nothing", "multi_modal_projector"])
def test_modules_that_cannot_be_saved_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--modules-to-save {name}"):
        adapted(options={"modules_to_save": [name]})


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_an_adapter_is_saved_loaded_and_merged_with_equal_logits(tmp_path: Path, options: dict[str, Any]) -> None:
    write_parts(tmp_path)
    build = {"lm": str(tmp_path / "lm"), "vision_tower": str(tmp_path / "tower")}
    from llava.model.builder import build_model

    loaded = build_model(**build, projector_type="mlp2x_gelu", template="vicuna_v1")
    network = add_lora(loaded, r=4, alpha=8, dropout=0.0, options=options)
    freeze_for(network, has_adapter=True)
    opened = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    for module in options.get("modules_to_save", ()):
        assert any(f"{module}.modules_to_save" in name for name in opened)
    shake(trained(network))
    network.eval()
    save_adapter(network, loaded.processor, tmp_path / "adapter", origin=loaded.origin)
    expected = logits(loaded)
    for merge in (False, True):
        again = load_checkpoint(tmp_path / "adapter", merge=merge)
        again.model.eval()
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=2e-5)


def test_options_of_the_command_line(tmp_path: Path) -> None:
    words = ["--lora_enable", "True", "--lora-target-modules", "q_proj", "v_proj", "--use_rslora", "True",
             "--init-lora-weights", "false", "--modules_to_save", "lm_head"]  # fmt: skip
    spec = parse_training_args([*arguments(tmp_path, tmp_path), *words]).parts_spec()
    assert spec.lora is not None and spec.lora["targets"] == ["q_proj", "v_proj"]
    assert spec.lora["options"] == {
        "use_rslora": True, "use_dora": False, "init_lora_weights": False, "modules_to_save": ["lm_head"]
    }  # fmt: skip
    with pytest.raises(ConfigError, match="--init-lora-weights is 'pissa'"):
        parse_training_args([*arguments(tmp_path, tmp_path), "--init_lora_weights", "pissa"])
