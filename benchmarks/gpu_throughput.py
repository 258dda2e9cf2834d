"""Training and answering on a CUDA device: the flat batch with FlexAttention against padded rows of transformers.

    python -m benchmarks.gpu_throughput [--shape 24m|7b] [--rounds N] [--batches N]

With `--shape 7b` the weights are bf16 and LoRA of rank 8 trains on the language model's linear layers with gradient
checkpointing; with `--shape 24m` they are float32 and everything but the tower trains. The learning rate is 0, so
losses of both sides must be equal, which is asserted. Answers are greedy; in float32 they must be equal where the two
likeliest tokens are not nearly tied.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.common import IMAGE_TOKEN_ID, library_model, median, our_model, padded_inputs, quiet, say, say_ratios
from benchmarks.eval_throughput import count_differences, left_padded, make_processor, make_questions
from benchmarks.sides import num_trained
from benchmarks.workloads import WORKLOADS, batches, length_grouped, shuffled
from llava.data.encode import Encoded
from llava.data.flat_batch import flatten
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Sampling
from llava.train.objectives.sft import SFT

DTYPES = {"24m": torch.float32, "7b": torch.bfloat16}
RELATIVE_LOSS_ERROR = {"24m": 1e-4, "7b": 2e-2}
"""Largest relative difference of summed losses: of float32 products, and of bf16 activations in 32 layers."""
SLOTS = 32
NUM_NEW_TOKENS = 32

Step = Callable[[Sequence[Encoded], Mapping[str, torch.Tensor]], float]


@contextmanager
def created_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Create weights on a device in a precision inside the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def trainable(model: Any, shape: str) -> Any:
    """Return a model whose language model trains: with adapters in the 7B shape, else directly."""
    model.model.vision_tower.requires_grad_(False)
    if shape == "24m":
        return model.train()
    names = [name for name, part in model.named_modules() if ".language_model." in name and name.endswith("_proj")]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted.train()


def our_step(model: Any, device: str, dtype: torch.dtype) -> Step:
    """Return a step on the flat batch: from sequences to gradients; it returns the summed loss."""

    def step(sequences: Sequence[Encoded], images: Mapping[str, torch.Tensor]) -> float:
        batch = flatten(sequences, images, image_token_id=IMAGE_TOKEN_ID).to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = SFT()(model, batch, num_items=batch.edge_weight.sum()).loss
        loss.backward()
        model.zero_grad()
        return loss.item() * len(batch.edge_weight)

    return step


def padded_step(model: Any, device: str, dtype: torch.dtype) -> Step:
    """Return a step of transformers on padded rows."""

    def step(sequences: Sequence[Encoded], images: Mapping[str, torch.Tensor]) -> float:
        inputs = {name: value.to(device) for name, value in padded_inputs(sequences, images).items()}
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        model.zero_grad()
        return float(loss.item()) * num_trained(sequences)

    return step


def run_plan(step: Step, plan: list[list[Encoded]], images: Mapping[str, torch.Tensor]) -> tuple[float, float, float]:
    """Return seconds, summed loss and peak GiB above the weights of one pass over a plan."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    loss = sum(step(batch, images) for batch in plan)
    torch.cuda.synchronize()
    return time.perf_counter() - start, loss, (torch.cuda.max_memory_allocated() - before) / 2**30


def train(ours: Any, library: Any, args: argparse.Namespace) -> dict[str, float]:
    """Print the table of both workloads; return ratios of seconds and memory."""
    ratios: dict[str, float] = {}
    dtype = DTYPES[args.shape]
    steps = {"ours": our_step(trainable(ours, args.shape), "cuda", dtype)}
    steps["transformers"] = padded_step(trainable(library, args.shape), "cuda", dtype)
    for name, workload in WORKLOADS.items():
        questions = workload.questions(args.batches)
        sequences = questions.sequences
        own = batches(sequences) if workload.questions_per_image > 1 else shuffled(sequences)
        plans = {"ours": own, "transformers": length_grouped(sequences)}
        seconds: dict[str, list[float]] = {side: [] for side in plans}
        losses, peaks = {}, {}
        for number in range(args.rounds + 1):  # the first round compiles kernels and is not counted
            for side in plans if number % 2 else reversed(plans):
                taken, losses[side], peaks[side] = run_plan(steps[side], plans[side], questions.images)
                seconds[side] += [taken] if number else []
        difference = abs(losses["ours"] - losses["transformers"]) / abs(losses["transformers"])
        if difference > RELATIVE_LOSS_ERROR[args.shape]:
            raise AssertionError(f"{name}: summed losses {losses}; expected a relative difference below "
                                 f"{RELATIVE_LOSS_ERROR[args.shape]}, got {difference:.2g}")  # fmt: skip
        say(f"\ntraining, {name}: {workload.about}; losses differ by {difference:.1e}")
        say("| side | s per 16 sequences | peak GiB above weights |\n| --- | --- | --- |")
        for side in plans:
            say(f"| {side} | {median(seconds[side]) / args.batches:.3f} | {peaks[side]:.2f} |")
        pairs = zip(seconds["transformers"], seconds["ours"], strict=True)
        ratios |= {
            f"gpu_train_{name}": median([their / our for their, our in pairs]),
            f"gpu_memory_{name}": peaks["ours"] / peaks["transformers"],
        }
    return ratios


def answer(ours: Any, library: Any, args: argparse.Namespace) -> dict[str, float]:
    """Print seconds of answering; return the ratio to padded batches."""
    engine = LocalEngine(ours.eval(), make_processor(), max_slots=SLOTS)
    exact = DTYPES[args.shape] == torch.float32
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    equal = total = 0
    for number in range(args.rounds + 1):
        asked = make_questions(engine, 16, seed=number)
        start = time.perf_counter()
        done = engine.generate([one.prompt for one in asked], Sampling(max_new_tokens=NUM_NEW_TOKENS))
        torch.cuda.synchronize()
        middle = time.perf_counter()
        theirs = padded_answers(library.eval(), asked)
        torch.cuda.synchronize()
        end = time.perf_counter()
        answers = [list(completion.token_ids) for [completion] in done]
        if exact:
            count_differences(library, [one.on("cuda") for one in asked], answers, theirs)
        equal += sum(our == their for our, their in zip(answers, theirs, strict=True))
        total += len(asked)
        if number:
            seconds["ours"].append(middle - start)
            seconds["transformers"].append(end - middle)
    say(f"\nanswering, {len(asked)} questions, {NUM_NEW_TOKENS} tokens each; {equal} of {total} answers equal")
    for side, taken in seconds.items():
        say(f"{side}: {len(asked) / median(taken):.1f} questions/s")
    pairs = zip(seconds["transformers"], seconds["ours"], strict=True)
    return {"gpu_answers": median([their / our for their, our in pairs])}


@torch.no_grad()
def padded_answers(model: Any, asked: Sequence[Any]) -> list[list[int]]:
    """Return the tokens of transformers in left-padded batches sorted by length, up to the end token."""
    answers: list[list[int]] = [[]] * len(asked)
    order = sorted(range(len(asked)), key=lambda index: asked[index].input_ids.shape[1])
    for first in range(0, len(order), SLOTS):
        numbers = order[first : first + SLOTS]
        inputs = {name: value.to("cuda") for name, value in left_padded([asked[index] for index in numbers]).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        output = model.generate(
            **inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        for index, row in zip(numbers, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answers[index] = row[: row.index(2) + 1] if 2 in row else row
    return answers


def main(argv: Sequence[str] | None = None) -> None:
    """Answer and train on both sides, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(DTYPES), default="7b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=2, help="batches of 16 sequences per round")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_throughput needs a CUDA device; benchmarks.train_throughput runs on a CPU")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    say(f"machine: {torch.cuda.get_device_name()}; torch {torch.__version__}, transformers {transformers.__version__}")
    ratios: dict[str, float] = {}
    with quiet():
        with created_on("cuda", DTYPES[args.shape]):
            ours = our_model(shape=args.shape)
            library = library_model(ours, args.shape)
        ratios |= answer(ours, library, args)
        gc.collect()
        torch.cuda.empty_cache()
        ratios |= train(ours, library, args)
    say("")
    say_ratios(ratios)


if __name__ == "__main__":
    main()
