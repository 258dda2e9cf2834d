"""Prompts about small pictures, and what transformers alone would answer."""

from __future__ import annotations

from typing import Any

import torch

from llava.generation.local import LocalEngine
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.model.building import Loaded
from llava.samples import Conversation, Turn
from tests.tiny import tiny_image


def ask(question: str, *images: int) -> Prompt:
    """A question about tiny pictures, by number."""
    marks = "<image>\n" * len(images)
    return Prompt(Conversation((Turn("human", marks + question),)), tuple(tiny_image(number) for number in images))


def mixed_prompts() -> list[Prompt]:
    """Shared pictures, two pictures, none, and very different lengths."""
    about = [ask("x" * (7 * number % 31) + f" number {number}?", number % 3) for number in range(6)]
    return [*about, ask("Text only"), ask("Compare them.", 0, 2), ask("y" * 60, 1)]


def engine_of(loaded: Loaded, **options: Any) -> LocalEngine:
    """An engine in the tree layout, which the tiny models compute exactly."""
    return LocalEngine(loaded.model, loaded.processor, **{"layout": "tree", **options})


def one(engine: LocalEngine, prompt: Prompt, sampling: Sampling) -> Completion:
    """The answer to a prompt that is alone."""
    [[completion]] = engine.generate([prompt], sampling)
    return completion


def reference_ids(loaded: Loaded, engine: LocalEngine, prompt: Prompt, num_tokens: int, **options: Any) -> list[int]:
    """Greedy tokens of `transformers`' own generate for one prompt alone."""
    reading = engine.reader.read(prompt)
    ids = torch.tensor([reading.encoded.input_ids])
    if reading.pictures:
        options["pixel_values"] = torch.stack([engine.reader.pixels(picture) for picture in reading.pictures])
    output = loaded.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, **options
    )
    found: list[int] = output[0, ids.shape[1] :].tolist()
    return found


@torch.no_grad()
def logits_without_cache(loaded: Loaded, engine: LocalEngine, prompt: Prompt, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), V]: what predicts each token of an answer, in one plain forward pass."""
    reading = engine.reader.read(prompt)
    ids = torch.tensor([[*reading.encoded.input_ids, *token_ids]])
    images = {}
    if reading.pictures:
        images["pixel_values"] = torch.stack([engine.reader.pixels(picture) for picture in reading.pictures])
    logits = loaded.model(input_ids=ids, use_cache=False, **images).logits[0]
    return logits[len(reading.encoded.input_ids) - 1 : -1]
