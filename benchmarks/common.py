"""Shared parts of the benchmarks: one model in two classes, random questions, alternated timing.

All data are random and made here, without downloads. On a shared machine, times of different programs cannot be
compared, but ratios of alternated runs can, so ratios are reported.
"""

from __future__ import annotations

import logging
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded
from llava.model.attention import use_tree_attention
from llava.model.config import LlavaMedConfig
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.precision import ProductShape, product_seconds

VOCABULARY = 32_000
IMAGE_TOKEN_ID = VOCABULARY - 1
PAD_TOKEN_ID = 0
BOS_TOKEN_ID = 1
NUM_IMAGE_TOKENS = 256
IMAGE_SIZE = 224
TEXT_TOKENS = (8, 256)
"""Shortest and longest text (question and answer); lengths are log-uniform between them."""

_TO_LIBRARY = {
    r"multi_modal_projector\.0\.": "multi_modal_projector.linear_1.",
    r"multi_modal_projector\.2\.": "multi_modal_projector.linear_2.",
}


@dataclass(frozen=True, slots=True)
class Questions:
    """Sequences about images, each image with the same number of questions, in the order of their images."""

    sequences: list[Encoded]
    images: dict[str, Tensor]


SHAPES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "tiny": (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "24m": (
        {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3},
        {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4},
    ),
    "7b": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
}
"""Sizes of tower (CLIP) and language model (Llama) by name."""


def config_values(shape: str = "24m") -> dict[str, Any]:
    """Return the configuration of a model with 256 tokens per image: tiny, 24M or 7B parameters."""
    tower_sizes, text_sizes = SHAPES[shape]
    vision = CLIPVisionConfig(image_size=IMAGE_SIZE, patch_size=14, **tower_sizes)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=2,
        pad_token_id=PAD_TOKEN_ID,
        **text_sizes,
    )
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": IMAGE_TOKEN_ID,
        "image_seq_length": NUM_IMAGE_TOKENS,
        "tie_word_embeddings": False,
    }


def our_model(seed: int = 0, shape: str = "24m") -> LlavaMedForConditionalGeneration:
    """Return the model of this package with tree attention."""
    torch.manual_seed(seed)
    model = LlavaMedForConditionalGeneration(LlavaMedConfig(projector_type="mlp2x_gelu", **config_values(shape)))
    use_tree_attention(model)
    return model


def library_model(ours: LlavaMedForConditionalGeneration, shape: str = "24m") -> LlavaForConditionalGeneration:
    """Return the model class of transformers with the weights of `ours` and SDPA attention."""
    model = LlavaForConditionalGeneration(LlavaConfig(**config_values(shape)))
    state = {}
    for name, weight in ours.state_dict().items():
        for pattern, replacement in _TO_LIBRARY.items():
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        state[name] = weight
    model.load_state_dict(state)
    return model


def random_questions(
    num_images: int, questions_per_image: int, answer_tokens: Callable[[random.Random, int], int], *, seed: int = 0
) -> Questions:
    """Return random images, each followed by random texts.

    Args:
        num_images: number of distinct images.
        questions_per_image: number of sequences about each image.
        answer_tokens: number of trained tokens at the end of a text, given a random generator and the text length.
        seed: seed of images and texts.
    """
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    images, sequences = {}, []
    lengths = _log_uniform(num_images * questions_per_image, draw)
    for number in range(num_images):
        key = f"image {number}"
        images[key] = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        for _ in range(questions_per_image):
            length = lengths.pop()
            text = [draw.randrange(3, IMAGE_TOKEN_ID) for _ in range(length)]
            sequences.append(_sequence(key, text, answer_tokens(draw, length)))
    return Questions(sequences, images)


def _log_uniform(count: int, draw: random.Random) -> list[int]:
    """Return evenly spaced quantiles of the log-uniform distribution in random order."""
    shortest, longest = TEXT_TOKENS
    lengths = [round(shortest * (longest / shortest) ** ((index + 0.5) / count)) for index in range(count)]
    draw.shuffle(lengths)
    return lengths


def _sequence(key: str, text: Sequence[int], num_trained: int) -> Encoded:
    ids = (BOS_TOKEN_ID, *([IMAGE_TOKEN_ID] * NUM_IMAGE_TOKENS), *text)
    first = len(ids) - num_trained
    labels = (*([IGNORE_INDEX] * first), *ids[first:])
    return Encoded(ids, labels, (0,) * len(ids), ((1, 1 + NUM_IMAGE_TOKENS),), (key,))


def padded_inputs(sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of a usual collator: right-padded rows, one image per row."""
    longest = max(len(sequence.input_ids) for sequence in sequences)
    ids = torch.full((len(sequences), longest), PAD_TOKEN_ID)
    labels = torch.full((len(sequences), longest), IGNORE_INDEX)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        ids[row, :length] = torch.tensor(sequence.input_ids)
        labels[row, :length] = torch.tensor(sequence.labels)
        mask[row, :length] = 1
    pixels = torch.stack([images[key] for sequence in sequences for key in sequence.images])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}


def alternate(sides: Mapping[str, Sequence[Callable[[], None]]]) -> dict[str, float]:
    """Run the batches of all sides in turn (first of each, second of each, ...); return seconds by side."""
    # All sides have the same number of batches, so other load on the machine affects them equally.
    seconds = dict.fromkeys(sides, 0.0)
    for batches in zip(*sides.values(), strict=True):
        for name, run in zip(sides, batches, strict=True):
            start = time.perf_counter()
            run()
            seconds[name] += time.perf_counter() - start
    return seconds


def median(values: Sequence[float]) -> float:
    """Return the median of measured values."""
    return statistics.median(values)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress log lines inside the context."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def say(text: str) -> None:
    """Write one line of the report."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


SMALL_PRODUCT, LARGE_PRODUCT = ProductShape(16, 576, 1536), ProductShape(512, 1024, 1024)
SLOW_GFLOPS = 20.0
"""Rate of the small product below which the large one is skipped, because it would take seconds."""


def product_gflops(dtype: torch.dtype) -> float:
    """Return the rate of CPU matrix products with the threads in use, in 10^9 operations per second."""
    best = 0.0
    for shape in (SMALL_PRODUCT, LARGE_PRODUCT):
        operations = 2 * shape.rows * shape.inner * shape.columns
        best = max(best, operations / product_seconds(dtype, shape, "cpu") / 1e9)
        if best < SLOW_GFLOPS:
            break
    return best


def machine() -> str:
    """Return a description of the machine: instruction set, cores, rates of products, versions."""
    rates = ", ".join(
        f"{name} {product_gflops(dtype):.1f}" for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))
    )
    return (
        f"machine: {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"threads; matrix products in GFLOP/s: {rates}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )


def say_ratios(ratios: Mapping[str, float]) -> None:
    """Write the last line of a benchmark, which is machine-readable."""
    say("RATIO " + " ".join(f"{name}={value:.2f}" for name, value in ratios.items()))
