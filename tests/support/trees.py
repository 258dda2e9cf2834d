"""Random sequences with shared prefixes, and the library's results for them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded

NUM_IMAGE_TOKENS = 4
IMAGE = 261
"""Id of the placeholder in the tiny models: the row after their byte vocabulary."""

Part = int | str
"""Text token, or the key of an image."""


def encoded(parts: Iterable[Part], trained: Iterable[int] = (), *, turn: int = 1) -> Encoded:
    """Return a sequence of text tokens and images; `trained` are positions after expansion."""
    ids: list[int] = []
    spans, keys = [], []
    for part in parts:
        if isinstance(part, str):
            spans.append((len(ids), len(ids) + NUM_IMAGE_TOKENS))
            keys.append(part)
            ids += [IMAGE] * NUM_IMAGE_TOKENS
        else:
            ids.append(part)
    wanted = set(trained)
    labels = [token if place in wanted else IGNORE_INDEX for place, token in enumerate(ids)]
    return Encoded(tuple(ids), tuple(labels), (turn,) * len(ids), tuple(spans), tuple(keys))


def random_sequences(draw: random.Random, num_sequences: int, *, longest: int = 12) -> list[Encoded]:
    """Return sequences that often continue an earlier one, of few token ids, so that more is shared."""
    written: list[list[Part]] = []
    for _ in range(num_sequences):
        stem: list[Part] = []
        if written and draw.random() < 0.75:
            earlier = draw.choice(written)
            stem = earlier[: draw.randint(1, len(earlier))]
        tail: list[Part] = [
            draw.choice("abc") if draw.random() < 0.08 else draw.randrange(5, 9)
            for _ in range(draw.randint(0, longest))
        ]
        written.append(stem + tail or [draw.randrange(5, 9)])
    return [_with_targets(parts, draw) for parts in written]


def _with_targets(parts: list[Part], draw: random.Random) -> Encoded:
    plain = encoded(parts)
    share = draw.choice([0.0, 0.2, 1.0])
    text = [place for place, token in enumerate(plain.input_ids) if token != IMAGE and place > 0]
    return encoded(parts, [place for place in text if draw.random() < share])


def random_images(image_size: int = 28) -> dict[str, Tensor]:
    """Return the pixels of the three images."""
    generator = torch.Generator().manual_seed(3)
    return {key: torch.randn(3, image_size, image_size, generator=generator) for key in "abc"}


def library_twin(ours: Any) -> LlavaForConditionalGeneration:
    """Return transformers' Llava with the weights of our model with two projector layers."""
    config = ours.config
    twin = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_id=config.image_token_id,
            image_seq_length=config.image_seq_length,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    twin.set_attn_implementation("sdpa")
    twin.load_state_dict({twin_name(name): weight for name, weight in ours.state_dict().items()})
    return twin.eval()


def twin_name(name: str) -> str:
    """Return the library's name of our weight."""
    return name.replace("projector.0.", "projector.linear_1.").replace("projector.2.", "projector.linear_2.")


def padded_inputs(sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one right-padded row per sequence, as a usual collator does."""
    longest = max(len(sequence.input_ids) for sequence in sequences)

    def rows(values: Iterable[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *([fill] * (longest - len(row)))] for row in values])

    inputs = {
        "input_ids": rows([sequence.input_ids for sequence in sequences], 0),
        "labels": rows([sequence.labels for sequence in sequences], IGNORE_INDEX),
        "attention_mask": rows([[1] * len(sequence.input_ids) for sequence in sequences], 0),
    }
    keys = [key for sequence in sequences for key in sequence.images]
    return inputs | ({"pixel_values": torch.stack([images[key] for key in keys])} if keys else {})


def num_trained(sequences: Sequence[Encoded]) -> int:
    """Return the number of trained tokens, counting shared ones for each sequence."""
    return sum(label != IGNORE_INDEX for sequence in sequences for label in sequence.labels)


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradient of every weight, zero if it has none, and clear them."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return found


QUERY_OR_KEY = re.compile(r"\.[qk]_proj\.")


def assert_same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Check that each error is small against its gradient, or 1e-4 of the largest gradient.

    A tower's key bias adds the same to all scores of a query, so its true gradient is zero and only rounding is left.

    In float32 a query's or key's error is also measured against its layer's value gradient. The gradient of a score is
    `p * (g - sum(p * g))`, with g what reaches the values: where keys are equal, as of one image twice, this cancels in
    the query's gradient, and the rounding of g, which differs between CPUs, is left.
    """
    assert found.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        floor = 1e-2 if "vision_tower" in name and name.endswith("k_proj.bias") else 1e-4
        error = float((found[name] - gradient).norm())
        size = max(float(gradient.norm()), floor * largest)
        if gradient.dtype == torch.float32 and (value := QUERY_OR_KEY.sub(".v_proj.", name)) != name:
            size = max(size, float(expected[value].norm()))
        limit = tolerance * size
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"
