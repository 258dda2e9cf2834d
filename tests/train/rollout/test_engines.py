"""Copy of the policy that samples: the same distribution as the policy, from plain layers, and where it is used."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import MethodType, SimpleNamespace
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
from llava.train.rollout.engines import conversing, copies_help, sampling_copy
from tests.support.tiny import tiny_image, tiny_llava

LANGUAGE = r".*layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
LORA = {
    "language": {"target_modules": LANGUAGE},
    "language and tower": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": LANGUAGE, "use_dora": True},
    "embeddings": {"target_modules": LANGUAGE, "modules_to_save": ["embed_tokens", "lm_head"]},
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
    network = sampling_copy(policy)
    assert can_decode(network) and not can_decode(policy)
    assert not any("lora" in name for name, _ in network.named_modules())
    for own, other in zip(dialogues(network, loaded), dialogues(policy, loaded), strict=True):
        assert own.encoded == other.encoded and own.texts == other.texts
        for mine, theirs in zip(own.logprobs, other.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    policy.load_state_dict({name: weight + 0.05 for name, weight in before.items()})
    changed = [dialogue.texts for dialogue in dialogues(sampling_copy(policy), loaded)]
    assert changed == [dialogue.texts for dialogue in dialogues(policy, loaded)]
    assert changed != [dialogue.texts for dialogue in dialogues(network, loaded)]


def test_hooks_of_gradient_checkpointing_are_left_out() -> None:
    policy = policy_of(tiny_llava())
    policy.enable_input_require_grads()
    embedding = policy.get_base_model().get_input_embeddings()
    assert embedding._forward_hooks
    assert can_decode(sampling_copy(policy)) and embedding._forward_hooks


def test_a_copy_is_freed_with_its_last_user() -> None:
    policy = policy_of(tiny_llava())
    policy._original_forward = policy.forward
    policy.forward = MethodType(type(policy).forward, policy)  # as accelerate does
    gc.collect()
    gc.disable()
    try:
        left = weakref.ref(sampling_copy(policy))
    finally:
        gc.enable()
    assert left() is None


def test_every_call_samples_from_the_policy_as_it_is_then() -> None:
    loaded = tiny_llava()
    policy = policy_of(loaded)
    script = Script(Conversation((Turn("human", "<image>\nWhat?"),)), ("And then?",), (tiny_image(0),), seed=1)
    sampling = Sampling(max_new_tokens=6, temperature=1.0, n=2, logprobs=True)
    settings: Any = SimpleNamespace(engine=None, slots=4)
    converse = conversing(policy, loaded.processor, settings, layout="tree", model="tiny", precision=nullcontext)

    def sampled() -> list[tuple[tuple[float, ...], ...]]:
        return [dialogue.logprobs for dialogue in converse([script], sampling)[0]]

    def expected() -> list[tuple[tuple[float, ...], ...]]:
        held = LocalEngine(policy, loaded.processor, max_slots=4).converse([script], sampling)
        return [dialogue.logprobs for dialogue in held[0]]

    first = sampled()
    for mine, theirs in zip(first, expected(), strict=True):
        assert [x for turn in mine for x in turn] == pytest.approx([x for turn in theirs for x in turn], abs=2e-5)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_A" in name:
                weight.mul_(-3)
    second = sampled()
    assert second != first
    for mine, theirs in zip(second, expected(), strict=True):
        assert [x for turn in mine for x in turn] == pytest.approx([x for turn in theirs for x in turn], abs=2e-5)


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_a_copy_is_made_where_it_helps_and_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not copies_help(tiny_llava().model, nullcontext)
    policy = policy_of(tiny_llava())
    assert copies_help(policy, nullcontext) and not copies_help(policy, autocast)
    assert not copies_help(policy_of(tiny_llava()).to(torch.bfloat16), nullcontext)
    size = sum(weight.numel() * weight.element_size() for weight in policy.parameters())
    for total, num_policies, helps in ((8 * size, 1, True), (8 * size - 8, 1, False), (8 * size, 2, False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_policies))
        monkeypatch.setattr(engines.psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total))
        assert copies_help(policy, nullcontext) == helps
    monkeypatch.undo()
    monkeypatch.setattr(engines, "quantized_layers", lambda network: [network])
    assert not copies_help(policy, nullcontext)
