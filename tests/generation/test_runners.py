"""Padded runner for models without positions, and 4-bit layers that train after answering."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from llava.generation.answering_mode import AnsweringMode
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Prompt, Sampling
from llava.model.builder import LoadedModel, build_model
from llava.model.lora import add_lora
from llava.samples import Conversation, Turn
from tests.support.generation_tools import ask, engine_of, mixed_prompts, one, reference_ids
from tests.support.tiny import byte_tokenizer, tiny_llava, write_tiny_lm, write_tiny_tower

GREEDY = Sampling(max_new_tokens=16)


def bloom(path: Path) -> LoadedModel:
    """Write and load a tiny model with ALiBi positions."""
    tokenizer = byte_tokenizer()
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(path / "lm")
    tokenizer.save_pretrained(path / "lm")
    loaded = build_model(str(path / "lm"), str(write_tiny_tower(path / "tower")))
    loaded.model.eval()
    return loaded


@pytest.fixture(scope="module")
def alibi(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return bloom(tmp_path_factory.mktemp("bloom"))


def test_a_model_without_positions_falls_back_and_is_exact(alibi: LoadedModel) -> None:
    engine = LocalEngine(alibi.model, alibi.processor, max_slots=4)
    assert engine.layout == "padded"
    prompts = mixed_prompts()
    for prompt, [answer] in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        assert list(answer.token_ids) == reference_ids(alibi, engine, prompt, GREEDY.max_new_tokens)


def test_modes_may_be_switched_between_two_steps() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    mode = AnsweringMode(model)
    for switched in (model, model[1], model[0]):
        switched.train(not switched.training)
        found = [module.training for module in model.modules()]
        with mode.entered():
            assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == found
    assert torch.is_grad_enabled()


def test_the_modules_are_listed_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_llava(seed=3)
    engine, listed = engine_of(loaded), []
    original = type(loaded.model).modules

    def counting(model: torch.nn.Module, *args: object) -> Iterator[torch.nn.Module]:
        listed.append(model)
        return original(model, *args)

    monkeypatch.setattr(type(loaded.model), "modules", counting)
    for num_tokens in (4, 40):
        sampling = Sampling(max_new_tokens=num_tokens, temperature=1.0, seed=2)
        before = len(listed)
        list(engine.stream(ask("Long?", 0), sampling))
        one(engine, ask("Long?", 0), sampling)
        # Modules and quantized layers, for a stream and for a batch; once for both where they meet.
        assert len(listed) - before in (2, 4)


def test_the_padded_runner_answers_as_the_slot_runner() -> None:
    loaded = tiny_llava(seed=3)
    sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=7, n=2, stop=("a", "e"))
    padded, slots = engine_of(loaded, layout="padded", max_slots=4), engine_of(loaded)
    assert padded.generate(mixed_prompts(), sampling) == slots.generate(mixed_prompts(), sampling)
    # Pieces are merged where the reader is slower than the model, so only the whole texts are equal.
    assert list(padded.stream(ask("Flow.", 1), GREEDY))[-1] == list(slots.stream(ask("Flow.", 1), GREEDY))[-1]
    stream = padded.stream(ask("Flow.", 1), GREEDY)
    next(stream)
    stream.close()
    assert one(padded, ask("Then?"), GREEDY) == one(slots, ask("Then?"), GREEDY)


def test_adapters_learn_after_answering_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    write_tiny_lm(tmp_path / "lm", hidden_size=64, intermediate_size=128)
    loaded = build_model(str(tmp_path / "lm"), str(write_tiny_tower(tmp_path / "tower")), bits=4)
    model = add_lora(loaded, r=2, alpha=4, dropout=0.0, bias="none")
    ids = torch.arange(5, 25)[None]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "lora_B" in name}

    model.eval()
    engine = engine_of(LoadedModel(model, loaded.processor, loaded.context_len))
    one(engine, ask("Quantized?", 0), GREEDY)
    list(engine.stream(ask("Quantized?", 0), GREEDY))
    conversation = Conversation((Turn("human", "a"), Turn("gpt", "b")))
    engine.score([Prompt(conversation)])
    assert not model.training
    model.train()
    found = gradients()
    assert found and all(gradient.abs().max() > 0 for gradient in found.values())
