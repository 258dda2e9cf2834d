"""Beam search and repetition penalty: the tokens of transformers' `generate`, and its rules by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from llava.errors import ConfigError
from llava.generation.beam_search import BeamSearch, penalize_repeats, run_beams
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Prompt, Sampling
from llava.generation.runners import PaddedRunner
from llava.model.builder import LoadedModel
from llava.samples import Conversation, Turn
from tests.support.tiny import tiny_image, tiny_llava

NUM_TOKENS = 12


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny_llava(lm=request.param)


def ask(text: str, *images: Image.Image) -> Prompt:
    return Prompt(Conversation((Turn("human", text),)), images)


PROMPTS = [ask("Is it?"), ask("<image>\nWhere?", tiny_image(3)), ask("<image>\nHow large is it?", tiny_image(4))]


def expected(
    loaded: LoadedModel, engine: LocalEngine, prompt: Prompt, *, ends: tuple[int, ...] = (), **options: Any
) -> list[list[int]]:
    """Tokens that the library generates from the embeddings of a prompt, as the published models did."""
    reading = engine.reader.read(prompt)
    model, ids = loaded.model, torch.tensor([reading.encoded.input_ids])
    kept: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: kept.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    pixels = [engine.reader.pixels(image) for image in reading.images]
    with torch.no_grad():
        model(input_ids=ids, **({"pixel_values": torch.stack(pixels)} if pixels else {}))
        hook.remove()
        answers = model.generate(
            inputs_embeds=kept[0],
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=list(ends or loaded.processor.stop_token_ids),
            pad_token_id=0,
            **options,
        )
    return [answer.tolist() for answer in answers]


def trimmed(ids: list[int], ends: tuple[int, ...]) -> tuple[int, ...]:
    """Without what the library fills answers up with."""
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return tuple(ids[: end + 1])


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_beams_are_those_of_the_library(loaded: LoadedModel, num_beams: int, penalty: float, layout: Any) -> None:
    reference = LocalEngine(loaded.model, loaded.processor, layout="padded")
    wanted = [
        expected(loaded, reference, prompt, num_beams=num_beams, num_return_sequences=2, repetition_penalty=penalty)
        for prompt in PROMPTS
    ]
    engine = LocalEngine(loaded.model, loaded.processor, layout=layout)
    sampling = Sampling(max_new_tokens=NUM_TOKENS, num_beams=num_beams, n=2, repetition_penalty=penalty)
    found = engine.generate(PROMPTS, sampling)
    ends = loaded.processor.stop_token_ids
    assert [[answer.token_ids for answer in answers] for answers in found] == [
        [trimmed(ids, ends) for ids in answers] for answers in wanted
    ]


@pytest.mark.parametrize("places", [(1,), (4,), (8, 10), (2, 5, 9)])
@pytest.mark.parametrize("num_beams", [2, 4])
def test_beams_that_end_are_those_of_the_library(loaded: LoadedModel, num_beams: int, places: tuple[int, ...]) -> None:
    """Where tokens of good beams end an answer, beams end early, late, and several at once."""
    engine = LocalEngine(loaded.model, loaded.processor, layout="padded")
    free = [
        expected(loaded, engine, prompt, ends=(1,), num_beams=num_beams, num_return_sequences=num_beams)
        for prompt in PROMPTS
    ]
    ends = tuple({ids[place] for beams in free for ids in beams for place in places if place < len(ids)})
    lengths = set()
    for prompt in PROMPTS:
        wanted = expected(loaded, engine, prompt, ends=ends, num_beams=num_beams)[0]
        reading = engine.reader.read(prompt)
        images = {image.key: engine.reader.pixels(image) for image in reading.images}
        search = BeamSearch(
            num_beams, limit=NUM_TOKENS, has_ended=lambda ids: ids[-1] in ends, num_end_tokens=len(ends)
        )
        with torch.no_grad():
            run_beams(search, PaddedRunner(loaded.model, pad_token_id=0), reading.encoded, images)
        assert search.ended[0].beam.token_ids == trimmed(wanted, ends)
        lengths.add(len(search.ended[0].beam.token_ids))
    assert min(lengths) < NUM_TOKENS


def test_a_repetition_penalty_is_the_librarys(loaded: LoadedModel) -> None:
    engine = LocalEngine(loaded.model, loaded.processor)
    wanted = [expected(loaded, engine, prompt, repetition_penalty=1.5)[0] for prompt in PROMPTS]
    plain = engine.generate(PROMPTS, Sampling(max_new_tokens=NUM_TOKENS))
    found = engine.generate(PROMPTS, Sampling(max_new_tokens=NUM_TOKENS, repetition_penalty=1.5))
    ends = loaded.processor.stop_token_ids
    assert [answers[0].token_ids for answers in found] == [trimmed(ids, ends) for ids in wanted]
    assert found != plain


def test_penalty_by_hand() -> None:
    scores = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    assert penalize_repeats(scores, [[0, 1, 0], []], 2.0).tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0]]
    assert penalize_repeats(scores, [[0], [1]], 1.0) is scores


def logits_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def test_a_search_by_hand() -> None:
    """Token 0 ends. After `1` (0.6) everything is unlikely, after `2` (0.4) the end is nearly certain."""
    search = BeamSearch(2, limit=3, has_ended=lambda ids: ids[-1] == 0)
    assert search.step(logits_of([0.0, 0.6, 0.4])) == [0, 0]
    assert [beam.token_ids for beam in search.running] == [(1,), (2,)]
    search.step(logits_of([0.2, 0.4, 0.4], [0.98, 0.01, 0.01]))
    assert [ended.beam.token_ids for ended in search.ended] == [(2, 0)]
    assert search.ended[0].value == pytest.approx(torch.tensor(0.4 * 0.98).log().item() / 2, abs=1e-6)
    assert not search.is_over


@pytest.mark.parametrize(("num_counted", "best"), [(0, (1, 2, 0)), (100, (1, 0))])
def test_what_counts_as_length_decides(num_counted: int, best: tuple[int, ...]) -> None:
    search = BeamSearch(2, limit=3, has_ended=lambda ids: ids[-1] == 0, num_counted=num_counted)
    search.step(logits_of([0.0, 0.9, 0.1]))
    search.step(logits_of([0.45, 0.05, 0.5], [0.01, 0.01, 0.01]))
    search.step(logits_of(*[[0.8, 0.1, 0.1]] * len(search.running)))
    assert search.is_over
    assert search.ended[0].beam.token_ids == best


def test_log_probabilities_and_end_of_a_beam(loaded: LoadedModel) -> None:
    engine = LocalEngine(loaded.model, loaded.processor)
    sampling = Sampling(max_new_tokens=4, num_beams=3, repetition_penalty=1.3, logprobs=True)
    [[answer]] = engine.generate(PROMPTS[1:2], sampling)
    assert answer.finish == "length" and answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids) == 4
    assert all(value < 0 for value in answer.logprobs)


def test_what_a_search_cannot_do(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(num_beams=2, temperature=0.5)
    with pytest.raises(ConfigError, match="n=3"):
        Sampling(num_beams=2, n=3)
    with pytest.raises(ConfigError, match="repetition_penalty"):
        Sampling(repetition_penalty=0.0)
    engine = LocalEngine(loaded.model, loaded.processor)
    [[failed], [answered]] = engine.generate(
        [ask("<image>\nNone given?"), PROMPTS[0]], Sampling(max_new_tokens=2, num_beams=2)
    )
    assert failed.finish == "error" and answered.finish in ("stop", "length")
