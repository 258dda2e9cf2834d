"""Prompts about small images, answers of transformers to them, and comparison of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity.answers import MARGIN
from llava.data.image_batch import batch_images
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.generation.sampling import TokenDraw
from llava.model.builder import LoadedModel
from llava.samples import Conversation, Turn
from tests.support.tiny import tiny_image
from tests.support.waiting import until

DRAW_MARGIN = 1e-5
"""Distance of a drawn number to the border between two tokens below which rounding may decide: probabilities are those
of float32 logits of size 10, whose rounding is a few times 1e-6."""


def ask(question: str, *images: int) -> Prompt:
    """Return a question about tiny images, by number."""
    marks = "<image>\n" * len(images)
    return Prompt(Conversation((Turn("human", marks + question),)), tuple(tiny_image(number) for number in images))


def mixed_prompts() -> list[Prompt]:
    """Return prompts with shared images, two images and none, of very different lengths."""
    about = [ask("x" * (7 * number % 31) + f" number {number}?", number % 3) for number in range(6)]
    return [*about, ask("Text only"), ask("Compare them.", 0, 2), ask("y" * 60, 1)]


def engine_of(loaded: LoadedModel, **options: Any) -> LocalEngine:
    """Return an engine in the tree layout, which the tiny models compute exactly."""
    return LocalEngine(loaded.model, loaded.processor, **{"layout": "tree", **options})


def one(engine: LocalEngine, prompt: Prompt, sampling: Sampling) -> Completion:
    """Return the answer to a single prompt."""
    [[completion]] = engine.generate([prompt], sampling)
    return completion


def reference_ids(
    loaded: LoadedModel, engine: LocalEngine, prompt: Prompt, num_tokens: int, **options: Any
) -> list[int]:
    """Return the greedy tokens of transformers' `generate` for a single prompt."""
    reading = engine.reader.read(prompt)
    ids = torch.tensor([reading.encoded.input_ids])
    if reading.images:
        options["pixel_values"] = torch.stack([engine.reader.pixels(image) for image in reading.images])
    output = loaded.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, **options
    )
    found: list[int] = output[0, ids.shape[1] :].tolist()
    return found


@torch.no_grad()
def logits_without_cache(engine: LocalEngine, prompt: Prompt, token_ids: list[int]) -> torch.Tensor:
    """Return the logits [len(token_ids), V] that predict each token of an answer, without a cache."""
    reading = engine.reader.read(prompt)
    ids = torch.tensor([[*reading.encoded.input_ids, *token_ids]])
    sizes = list(reading.encoded.image_sizes) if engine.processor.has_variable_images else []
    images = batch_images([engine.reader.pixels(image) for image in reading.images], sizes).keywords()
    logits = engine.model(input_ids=ids, use_cache=False, **images).logits[0]
    return logits[len(reading.encoded.input_ids) - 1 : -1]


def assert_same_answers(
    engine: LocalEngine,
    prompts: Sequence[Prompt],
    found: Sequence[Completion],
    wanted: Sequence[Completion],
    sampling: Sampling,
) -> None:
    """Check that each two answers are equal or differ after a tie; text after a tie is not compared."""
    for prompt, one_answer, other in zip(prompts, found, wanted, strict=True):
        if one_answer.token_ids == other.token_ids:
            same = [(each.text, each.finish, each.error) for each in (one_answer, other)]
            assert same[0] == same[1]
        else:
            assert_tie(engine, prompt, one_answer.token_ids, other.token_ids, sampling)


def assert_tie(
    engine: LocalEngine,
    prompt: Prompt,
    found: Sequence[int],
    wanted: Sequence[int],
    sampling: Sampling,
) -> None:
    """Check by a plain forward pass that two answers differ first where rounding may decide."""
    place = next((at for at, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    assert place is not None, f"one answer continues after the end of the other: {found} {wanted}"
    tokens = sorted((found[place], wanted[place]))
    logits = logits_without_cache(engine, prompt, list(wanted[: place + 1]))[place].double()
    if sampling.temperature == 0.0:
        gap, margin = float(logits.max() - logits[tokens].min()), MARGIN
    else:
        draw = TokenDraw(sampling)
        assert not draw.truncates
        number = [draw.number() for _ in range(place + 1)][-1]
        borders = (logits / sampling.temperature).softmax(-1).cumsum(-1)[tokens[0] : tokens[1]]
        gap, margin = float((borders - number).abs().max()), DRAW_MARGIN
    assert gap < margin, f"token {place} is not a tie: {found} {wanted}, {gap:.1e} apart"


def wait_for_readers(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every decoding step wait until all clients have taken their news; all of them must read."""
    decode = engine.scheduler.runner.decode

    def decode_when_read(token_ids: Sequence[int]) -> Tensor:
        assert until(lambda: not any(handle._changed for handle in list(engine.driver._handles)))
        return decode(token_ids)

    monkeypatch.setattr(engine.scheduler.runner, "decode", decode_when_read)
