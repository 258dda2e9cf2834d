"""Copy of the policy that samples: the same distribution as the policy, from plain layers, and where it is used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llava.generation.decode_step import can_decode
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Dialogue, Sampling, Script
from llava.model.builder import LoadedModel
from llava.samples import Conversation, Turn
from llava.train.rollout import engines
from llava.train.rollout.engines import copies_help, sampling_copy
from tests.support.tiny import tiny_image, tiny_llava

LANGUAGE = r".*layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
LORA = {
    "language": {"target_modules": LANGUAGE},
    "language and tower": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": LANGUAGE, "use_dora": True},
    "projector": {"target_modules": LANGUAGE, "modules_to_save": ["multi_modal_projector"]},
}


def policy_of(loaded: LoadedModel, kind: str = "language") -> Any:
    """Return a model with an adapter of random weights."""
    torch.manual_seed(3)
    policy = get_peft_model(loaded.model, LoraConfig(r=4, init_lora_weights=False, **LORA[kind]))
    return policy.eval()


def dialogues(network: Any, loaded: LoadedModel) -> list[Dialogue]:
    scripts = [
        Script(Conversation((Turn("human", f"<image>\nCase {n}?"),)), ("And then?",), (tiny_image(n),), seed=n)
        for n in range(3)
    ]
    sampling = Sampling(max_new_tokens=6, temperature=1.0, n=2, logprobs=True)
    held = LocalEngine(network, loaded.processor, max_slots=4).converse(scripts, sampling)
    return [dialogue for group in held for dialogue in group]


@pytest.mark.parametrize("kind", LORA)
def test_a_copy_samples_what_the_policy_samples(kind: str) -> None:
    loaded = tiny_llava()
    policy = policy_of(loaded, kind)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    network = sampling_copy(policy, bf16=False)
    assert can_decode(network) and not can_decode(policy)
    assert not any("lora" in name for name, _ in network.named_modules())
    for own, other in zip(dialogues(network, loaded), dialogues(policy, loaded), strict=True):
        assert own.encoded == other.encoded and own.texts == other.texts
        for mine, theirs in zip(own.logprobs, other.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    policy.load_state_dict({name: weight + 0.05 for name, weight in before.items()})
    changed = [dialogue.texts for dialogue in dialogues(sampling_copy(policy, bf16=False), loaded)]
    assert changed == [dialogue.texts for dialogue in dialogues(policy, loaded)]
    assert changed != [dialogue.texts for dialogue in dialogues(network, loaded)]


def test_a_copy_in_bfloat16_is_cast_after_the_merge() -> None:
    loaded = tiny_llava()
    policy = policy_of(loaded)
    exact, network = sampling_copy(policy, bf16=False), sampling_copy(policy, bf16=True)
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16} and can_decode(network)
    whole = exact.state_dict()
    assert all(torch.equal(weight, whole[name].to(weight.dtype)) for name, weight in network.state_dict().items())
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


def test_a_copy_is_made_where_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_llava().model
    assert not copies_help(plain, bf16=False) and copies_help(plain, bf16=True)
    policy = policy_of(tiny_llava())
    assert copies_help(policy, bf16=False)
    size = sum(weight.numel() * weight.element_size() for weight in policy.parameters())
    monkeypatch.setattr(engines.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size - 1))
    assert not copies_help(policy, bf16=False)
    monkeypatch.setattr(engines.psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * size))
    assert copies_help(policy, bf16=False)
    monkeypatch.setattr(engines, "quantized_layers", lambda network: [network])
    assert not copies_help(policy, bf16=False)
