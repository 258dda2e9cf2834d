"""Decoding step of a model of the size of SmolLM2-135M: operator calls, and time relative to its matrix products.

`ratios` measures one thread's processor time, the least of many steps: `step_1` is the step over its bare products in
float32, `int8_N` the step with weights of 8 bits over that in float32, for N sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks import common
from llava.data.encode import Encoded
from llava.generation.runners import SlotRunner
from llava.model.attention import use_tree_attention
from llava.model.config import LlavaMedConfig
from llava.model.int8 import quantize_text_layers
from llava.model.modeling import LlavaMedForConditionalGeneration

NUM_LAYERS, VOCABULARY, PROMPT = 30, 49_152, 64
ANSWER = 32
NUMS = (1, 4, 8, 32)
"""Numbers of sequences."""


def make_model() -> Any:
    """Return a random model with a language model of the size of SmolLM2-135M."""
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=common.IMAGE_SIZE, patch_size=14, **sizes)
    torch.manual_seed(0)
    config = LlavaMedConfig(
        projector_type="mlp2x_gelu",
        vision_config=vision,
        text_config=text,
        image_token_id=VOCABULARY - 1,
        image_seq_length=common.NUM_IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaMedForConditionalGeneration(config).eval()
    use_tree_attention(model)
    return model


def running(model: Any, num: int) -> tuple[SlotRunner, list[int]]:
    """Return a runner with `num` sequences, and the first token of each."""
    generator = torch.Generator().manual_seed(1)
    runner = SlotRunner(model, image_token_id=VOCABULARY - 1, max_slots=num, max_length=512)
    ids = torch.randint(3, VOCABULARY - 1, (num, PROMPT), generator=generator).tolist()
    row = runner.prefill([Encoded(tuple(one), (-100,) * PROMPT, (0,) * PROMPT, (), ()) for one in ids], {})
    runner.join(row, range(num))
    return runner, row.logits.argmax(dim=-1).tolist()


def answers(model: Any, num: int) -> list[list[int]]:
    """Return greedy answers [num, ANSWER]."""
    runner, tokens = running(model, num)
    found = [tokens]
    for _ in range(ANSWER - 1):
        found.append(runner.decode(found[-1]).argmax(dim=-1).tolist())
    return [list(one) for one in zip(*found, strict=True)]


def least_seconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least processor time of each function; they run in turn."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.thread_time()
            function()
            least[name] = min(least[name], time.thread_time() - start)
    return least


def bare_products(model: Any, num: int) -> Callable[[], None]:
    """Return a function that computes the matrix products of a step and nothing else."""
    layers = [module for module in model.get_decoder().modules() if isinstance(module, nn.Linear)]
    weights = [layer.weight.t() for layer in (*layers, model.get_output_embeddings())]
    rows = {width: torch.randn(num, width) for width in {weight.shape[0] for weight in weights}}

    def compute() -> None:
        for weight in weights:
            torch.mm(rows[weight.shape[0]], weight)

    return compute


@torch.no_grad()
def ratios(rounds: int) -> dict[str, float]:
    """Measure and print; return the ratios."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, num_steps = make_model(), 8 * rounds + 2
    runner, tokens = running(model, 1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        runner.decode(tokens)
    calls = sum(event.count for event in profiled.key_averages()) / NUM_LAYERS
    plain: dict[int, dict[str, float]] = {}
    for num in NUMS:
        runner, tokens = running(model, num)
        step = lambda runner=runner, tokens=tokens: runner.decode(tokens)  # noqa: E731
        plain[num] = least_seconds({"step": step, "bare": bare_products(model, num)}, num_steps)
    expected = answers(model, 4)
    quantize_text_layers(model)
    packed = {}
    for num in NUMS:
        runner, tokens = running(model, num)
        packed[num] = least_seconds({"step": lambda: runner.decode(tokens)}, num_steps)["step"]  # noqa: B023
    pairs = [pair for one, two in zip(expected, answers(model, 4), strict=True) for pair in zip(one, two, strict=True)]
    torch.set_num_threads(num_threads)
    shown = "; ".join(
        f"{num} sequences: step {1e3 * plain[num]['step']:.1f} ms, products {1e3 * plain[num]['bare']:.1f}, "
        f"int8 step {1e3 * packed[num]:.1f}"
        for num in plain
    )
    equal = sum(one == two for one, two in pairs) / len(pairs)
    common.say(f"decode: {calls:.0f} operator calls a layer; {shown}; equal greedy tokens {equal:.2f}")
    return {
        "step_calls": calls,
        "step_1": plain[1]["step"] / plain[1]["bare"],
        **{f"int8_{num}": packed[num] / plain[num]["step"] for num in NUMS},
    }
