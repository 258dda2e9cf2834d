"""Adapters that peft writes for transformers' Llava: recognized, loaded with equal logits, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llava import cli
from llava.errors import CheckpointError, ConfigError
from llava.generation.loading import open_engine
from llava.generation.protocol import Prompt, Sampling
from llava.model.builder import LoadedModel
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.formats import KINDS, Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter, save_model
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.checkpoint.tools.diff import CheckpointWeights, differences
from llava.model.checkpoint.tools.doctor import find_problems
from llava.model.checkpoint.tools.inspection import inspect_checkpoint
from llava.model.checkpoint.tools.merge_lora import merge_lora
from llava.model.lora import add_lora, freeze_for
from llava.samples import Conversation, Turn
from tests.support.model_tools import batch, logits, shake, trained
from tests.support.tiny import tiny_image, tiny_llava

LINEAR = r".*language_model\..*(q_proj|v_proj|down_proj)"
ADAPTERS: dict[str, dict[str, Any]] = {
    "last names": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*vision_tower.*"},
    "a pattern": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "ranks and alphas by layer": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, r"layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"v_proj": 3},
    },
    "projector": {"target_modules": r".*(multi_modal_projector\.linear_\d|q_proj)"},
    "tower": {"target_modules": r".*vision_tower.*(q_proj|fc1)"},
    "bias of the second matrix": {"target_modules": r".*vision_tower.*(q_proj|fc1)", "lora_bias": True},
    "every linear layer": {"target_modules": "all-linear"},
    "projector trained whole": {"target_modules": LINEAR, "modules_to_save": ["multi_modal_projector"]},
    "head and embeddings trained whole": {"target_modules": LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]},
    "embeddings": {"target_modules": r".*(embed_tokens|q_proj)"},
    "head": {"target_modules": r"(lm_head|.*q_proj)"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model of transformers' Llava."""
    folder = tmp_path_factory.mktemp("hf") / "base"
    export_hf(tiny_llava(), folder)
    return folder


def write_adapter(base: Path, folder: Path, **settings: Any) -> Tensor:
    """Train an adapter of the base by chance, save it as peft does, and return the adapted logits."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **settings))
    shake(trained(adapted))
    adapted.eval()
    adapted.save_pretrained(str(folder))
    return library_logits(adapted)


def library_logits(model: nn.Module) -> Tensor:
    inputs = {name: tensor for name, tensor in batch(tiny_llava()).items() if name != "labels"}
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_those_of_peft(tmp_path: Path, base: Path, name: str) -> None:
    expected = write_adapter(base, tmp_path / "adapter", **ADAPTERS[name])
    assert Checkpoint.open(tmp_path / "adapter").kind == "hf_adapter"
    assert not [
        finding for finding in find_problems(inspect_checkpoint(tmp_path / "adapter")) if finding.level == "error"
    ]
    plain = logits(load_checkpoint(base))
    assert (plain - expected).abs().max() > 0.01
    for merge in (True, False):
        found = logits(load_checkpoint(tmp_path / "adapter", base=str(base), merge=merge))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    # The base that adapter_config.json names is found without a flag.
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "adapter")), expected, rtol=0, atol=2e-5)


def test_a_bias_where_the_base_has_none_is_not_merged(tmp_path: Path, base: Path) -> None:
    expected = write_adapter(base, tmp_path / "adapter", target_modules=LINEAR, lora_bias=True)
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "adapter", merge=False)), expected, rtol=0, atol=2e-5)
    with pytest.raises(CheckpointError, match=r"peft cannot add this adapter .* the base layer has no bias"):
        load_checkpoint(tmp_path / "adapter")


def old_names(name: str) -> str:
    """Return the name that transformers before 4.52 gives a module of Llava."""
    bare = name.removeprefix("base_model.model.")
    if bare.startswith("lm_head"):
        return f"base_model.model.language_model.{bare}"
    bare = bare.removeprefix("model.")
    if bare.startswith("language_model."):
        return f"base_model.model.language_model.model.{bare.removeprefix('language_model.')}"
    return f"base_model.model.{bare}"


WRITERS: dict[str, Callable[[str], str]] = {
    "transformers before 4.52": old_names,
    "without peft's prefix": lambda name: name.removeprefix("base_model.model."),
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight") if "lora_" in name else name,
    "modules_to_save in the name": lambda name: name.replace("lm_head.", "lm_head.modules_to_save."),
}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
def test_names_of_other_writers(tmp_path: Path, base: Path, writer: str, safe: bool) -> None:
    folder = tmp_path / "adapter"
    expected = write_adapter(base, folder, target_modules=LINEAR, modules_to_save=["lm_head"])
    file = folder / "adapter_model.safetensors"
    state = {WRITERS[writer](name): tensor for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(state, file) if safe else torch.save(state, folder / "adapter_model.bin")
    torch.testing.assert_close(logits(load_checkpoint(folder, base=str(base))), expected, rtol=0, atol=2e-5)


def our_adapter(folder: Path, built: LoadedModel) -> Path:
    network = add_lora(built, r=4)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    save_adapter(network, built.processor, folder, origin=built.origin)
    return folder


def differing(first: Path, second: Path) -> list[str]:
    weights = (CheckpointWeights(Checkpoint.open(path)) for path in (first, second))
    return [difference.name for difference in differences(*weights)]


def test_our_export_is_read_back_as_the_model_that_was_trained(
    tmp_path: Path, built: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = our_adapter(tmp_path / "lora", built)
    convert_checkpoint(lora, tmp_path / "whole", "model")
    for words in (
        ["export", str(lora), str(tmp_path / "peft"), "--to", "peft"],
        ["doctor", str(tmp_path / "peft" / "adapter")],
        ["inspect", str(tmp_path / "peft" / "adapter")],
        [
            *("convert", str(tmp_path / "peft" / "adapter"), str(tmp_path / "back"), "--to", "model"),
            *("--model-base", str(tmp_path / "peft" / "base")),
        ],
    ):
        cli.main(["checkpoint", *words])
    printed = capsys.readouterr().out
    assert printed.count(KINDS["hf_adapter"]) == 3
    assert "nothing keeps it from loading" in printed
    assert differing(tmp_path / "whole", tmp_path / "back") == []
    merge_lora(tmp_path / "peft" / "adapter", str(tmp_path / "peft" / "base"), tmp_path / "merged")
    assert differing(tmp_path / "whole", tmp_path / "merged") == []


def test_the_exported_adapter_names_the_base_beside_it(tmp_path: Path, built: LoadedModel) -> None:
    convert_checkpoint(our_adapter(tmp_path / "lora", built), tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "peft" / "base")


@pytest.mark.parametrize("name", ["a pattern", "dora", "projector", "projector trained whole", "every linear layer"])
def test_as_an_adapter_of_this_package(tmp_path: Path, base: Path, name: str) -> None:
    expected = write_adapter(base, tmp_path / "adapter", **ADAPTERS[name])
    written = convert_checkpoint(tmp_path / "adapter", tmp_path / "ours", "ours", LoadOptions(base=str(base)))
    assert written.kind == "adapter"
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "ours")), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("to", ["model", "hf", "legacy"])
def test_as_a_whole_model(tmp_path: Path, base: Path, to: str) -> None:
    expected = write_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    convert_checkpoint(tmp_path / "adapter", tmp_path / "whole", to)
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "whole")), expected, rtol=0, atol=2e-5)


def test_on_the_base_converted_to_this_package(tmp_path: Path, base: Path) -> None:
    expected = write_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    convert_checkpoint(base, tmp_path / "ours", "model")
    found = logits(load_checkpoint(tmp_path / "adapter", base=str(tmp_path / "ours")))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_answers_of_an_engine(tmp_path: Path, base: Path) -> None:
    write_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    prompt = Prompt(Conversation((Turn("human", "<image>\nWhat?"),)), (tiny_image(0),))
    convert_checkpoint(tmp_path / "adapter", tmp_path / "whole", "model")
    answers = [
        open_engine(str(path), base=given, device="cpu").generate([prompt], Sampling(max_new_tokens=6))[0][0].token_ids
        for path, given in ((tmp_path / "adapter", str(base)), (tmp_path / "whole", None), (base, None))
    ]
    assert answers[0] == answers[1] != answers[2]


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


SETTINGS = [
    ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base too"),
    ({"target_parameters": ["experts.gate"]}, "target_parameters"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"r": 8}, "do not have the rank r = 8"),
    ({"r": "4"}, "expected numbers"),
    ({"lora_alpha": None}, "expected numbers"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_that_cannot_be_used_are_named_by_doctor_and_loader(
    tmp_path: Path, base: Path, settings: dict[str, Any], message: str
) -> None:
    write_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    change(tmp_path / "adapter", **settings)
    assert_refused(tmp_path / "adapter", base, message)


def assert_refused(adapter: Path, base: Path, message: str) -> None:
    found = [finding.text for finding in find_problems(inspect_checkpoint(adapter)) if finding.level == "error"]
    assert message in " ".join(found)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(adapter, base=str(base))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def without(state: dict[str, Tensor], word: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if word not in name}


CONTENTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "half a pair": (lambda state: without(state, "layers.0.self_attn.q_proj.lora_B"), "only one of LoRA's two"),
    "no first matrices": (lambda state: without(state, "lora_A"), "only one of LoRA's two"),
    "a stranger": (lambda state: {**state, "base_model.model.gate.lora_A.weight": torch.ones(4, 4)}, "gate"),
    "another method": (lambda state: {**state, "base_model.model.model.language_model.lokr_w1": torch.ones(4)}, "lokr"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_that_cannot_be_used(tmp_path: Path, base: Path, name: str) -> None:
    write_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    edit, message = CONTENTS[name]
    save_file(edit(load_file(file)), file)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "adapter", base=str(base))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_method_that_is_not_lora(tmp_path: Path, base: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(base)
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    assert_refused(tmp_path / "adapter", base, "peft_type 'IA3'")


@pytest.fixture
def other_bases(tmp_path: Path) -> Iterator[dict[str, Path]]:
    larger = tiny_llava(lm_sizes={"intermediate_size": 96})
    export_hf(larger, tmp_path / "larger")
    more_layers = tiny_llava(lm_sizes={"num_hidden_layers": 1})
    save_model(more_layers.model, more_layers.processor, tmp_path / "fewer layers")
    yield {"another width": tmp_path / "larger", "fewer layers": tmp_path / "fewer layers"}


def test_a_base_of_another_size_is_refused(tmp_path: Path, base: Path, other_bases: dict[str, Path]) -> None:
    write_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    for folder in other_bases.values():
        with pytest.raises(CheckpointError, match="does not fit") as caught:
            load_checkpoint(tmp_path / "adapter", base=str(folder))
        assert "\n" not in str(caught.value)


def test_a_base_of_another_kind_is_refused(tmp_path: Path, base: Path, built: LoadedModel) -> None:
    write_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    with pytest.raises(CheckpointError, match=r"a plain language model; .* needs the transformers' Llava"):
        load_checkpoint(tmp_path / "adapter", base=str(tmp_path / "parts" / "lm"))
    with pytest.raises(ConfigError, match="--vision-tower would change nothing"):
        load_checkpoint(tmp_path / "adapter", base=str(base), vision_tower="x")


def test_a_base_that_is_not_here_is_asked_for(tmp_path: Path, base: Path) -> None:
    write_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    change(tmp_path / "adapter", base_model_name_or_path="llava-hf/llava-1.5-7b-hf")
    with pytest.raises(CheckpointError, match=r"llava-hf/llava-1\.5-7b-hf.*pass it with --model-base"):
        load_checkpoint(tmp_path / "adapter")


@pytest.mark.parametrize("settings", [ADAPTERS["head"], {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}])
def test_a_table_that_serves_twice_is_not_changed_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    export_hf(tiny_llava(tie=True), tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", **settings)
    with pytest.raises(CheckpointError, match="one table for embeddings and head"):
        load_checkpoint(tmp_path / "adapter")


NOTES = [
    ("rslora", "rsLoRA, r 4, lora_alpha 8, so its update is multiplied by 4, on 6 layers"),
    ("dora", "DoRA, r 4, lora_alpha 8, so its update is multiplied by 2, on 6 layers"),
    ("ranks and alphas by layer", "LoRA, r 2, lora_alpha 8, so its update is multiplied by 4, on 2 layers"),
    ("projector", "it adapts 2 of the language model, 2 of the projector, 3 of the vision tower: 0 1, 2 1, q_proj 5"),
    ("tower", "it adapts 6 of the vision tower: fc1 3, q_proj 3"),
    ("projector trained whole", "it replaces 4 weights of the base: model.multi_modal_projector.0.bias"),
]


@pytest.mark.parametrize(("name", "note"), NOTES)
def test_doctor_explains_an_adapter(tmp_path: Path, base: Path, name: str, note: str) -> None:
    write_adapter(base, tmp_path / "adapter", **ADAPTERS[name])
    found = [finding.text for finding in find_problems(inspect_checkpoint(tmp_path / "adapter"))]
    assert any(text.startswith(note) for text in found), found


def test_doctor_compares_an_adapter_with_its_base(tmp_path: Path, base: Path, other_bases: dict[str, Path]) -> None:
    write_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    for place, folder in other_bases.items():
        change(tmp_path / "adapter", base_model_name_or_path=str(folder))
        errors = [one.text for one in find_problems(inspect_checkpoint(tmp_path / "adapter")) if one.level == "error"]
        assert [error.partition(":")[0] for error in errors] == [f"it does not fit its base {folder.name}"], place
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "adapter"))
    assert not [one for one in find_problems(inspect_checkpoint(tmp_path / "adapter")) if one.level == "error"]
