"""Answering: our engine against transformers' generate, one question at a time and in left-padded batches.

python -m benchmarks.eval_throughput [--rounds 5] [--num_images 16]

Five questions an image, greedy, 16 new tokens, float32. The library's side gets its tokens and pixels ready-made; ours
starts from text and pictures inside the measured time. Every side must give the same tokens; a difference is allowed
only where the two likeliest tokens are less than 1e-3 apart, and is counted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks import common
from llava.generation.local import LocalEngine
from llava.generation.protocol import Prompt, Sampling
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Turn
from llava.utils.cli import Parser

QUESTIONS_PER_IMAGE = 5
NUM_NEW_TOKENS = 16
BATCH_SIZE = 16
NEAR_TIE = 1e-3
OVERHEAD = len("<s>[INST] \n [/INST]") - len("<s>") + 1
"""Tokens that the template puts around a question."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One question, as our engine takes it and as the library does."""

    prompt: Prompt
    input_ids: Tensor
    pixels: Tensor


def make_processor() -> LlavaMedProcessor:
    """One token a letter, the benchmark model's place holder, and its 224-pixel preprocessing."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    vocabulary |= {f"<word {index}>": index for index in range(len(vocabulary), common.IMAGE_TOKEN_ID)}
    vocabulary["<image>"] = common.IMAGE_TOKEN_ID
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = common.IMAGE_SIZE
    pictures = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return LlavaMedProcessor(tokenizer, pictures, template="mistral_instruct", num_image_tokens=common.NUM_IMAGE_TOKENS)


def make_questions(engine: LocalEngine, num_images: int, seed: int) -> list[Asked]:
    """Random questions, five an image, in the order of their images."""
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    shortest, longest = common.TEXT_TOKENS
    asked = []
    for _ in range(num_images):
        picture = Image.fromarray(noise.integers(0, 256, (common.IMAGE_SIZE,) * 2 + (3,), dtype=np.uint8))
        pixels = engine.processor.pixels([picture])
        for _ in range(QUESTIONS_PER_IMAGE):
            length = round(shortest * (longest / shortest) ** draw.random())
            text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=max(1, length - OVERHEAD)))
            prompt = Prompt(Conversation((Turn("human", f"<image>\n{text}"),)), (picture,))
            ids = engine.reader.read(prompt).encoded.input_ids
            asked.append(Asked(prompt, torch.tensor([ids]), pixels))
    return asked


def left_padded(batch: Sequence[Asked]) -> dict[str, Tensor]:
    """What a usual evaluation script hands to the library."""
    longest = max(one.input_ids.shape[1] for one in batch)
    ids = torch.full((len(batch), longest), common.PAD_TOKEN_ID)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, one in enumerate(batch):
        ids[row, longest - one.input_ids.shape[1] :] = one.input_ids[0]
        mask[row, longest - one.input_ids.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat([one.pixels for one in batch])}


@torch.no_grad()
def library_answers(
    model: LlavaForConditionalGeneration, asked: Sequence[Asked], order: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Tokens that transformers generates for each question, asked in `order`."""
    answers: list[list[int]] = [[]] * len(asked)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        inputs = left_padded([asked[number] for number in numbers])
        output = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        for number, row in zip(numbers, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answers[number] = row
    return answers


def our_answers(engine: LocalEngine, asked: Sequence[Asked]) -> list[list[int]]:
    """Tokens that our engine generates for each question."""
    completions = engine.generate([one.prompt for one in asked], Sampling(max_new_tokens=NUM_NEW_TOKENS))
    return [list(completion.token_ids) for [completion] in completions]


@torch.no_grad()
def count_differences(
    model: LlavaForConditionalGeneration, asked: Sequence[Asked], ours: list[list[int]], theirs: list[list[int]]
) -> int:
    """How many answers differ after a near tie.

    Raises:
        AssertionError: two answers differ where one token is clearly the likeliest.
    """
    num_different = 0
    for one, our, their in zip(asked, ours, theirs, strict=True):
        place = next((i for i, pair in enumerate(zip(our, their, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        num_different += 1
        ids = torch.cat([one.input_ids, torch.tensor([our[:place]], dtype=torch.long)], dim=1)
        logits = model(input_ids=ids, pixel_values=one.pixels, use_cache=False).logits[0, -1]
        best = logits.topk(2).values
        margin = float(best[0] - best[1])
        assert margin < NEAR_TIE, f"different tokens though the two likeliest are {margin:.2g} apart"
    return num_different


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Seconds and result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rounds and print a table."""
    parser = Parser(prog="python -m benchmarks.eval_throughput", description="Answering, ours and transformers'.")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--num_images", type=int, default=16, help="images in a round, five questions each")
    args = parser.parse_args(argv)
    ours = common.our_model().eval()
    library = common.library_model(ours).eval()
    engine = LocalEngine(ours, make_processor(), max_slots=BATCH_SIZE)
    seconds: dict[str, list[float]] = {"ours": [], "loop": [], "padded": [], "padded_sorted": []}
    num_different = num_answers = 0
    # The first round warms up and is not counted.
    for number in range(args.rounds + 1):
        asked = make_questions(engine, args.num_images, seed=number)
        in_order = list(range(len(asked)))
        by_length = sorted(in_order, key=lambda index: asked[index].input_ids.shape[1])
        sides: dict[str, Callable[[], list[list[int]]]] = {
            "ours": lambda asked=asked: our_answers(engine, asked),
            "loop": lambda asked=asked, order=in_order: library_answers(library, asked, order, 1),
            "padded": lambda asked=asked, order=in_order: library_answers(library, asked, order, BATCH_SIZE),
            "padded_sorted": lambda asked=asked, order=by_length: library_answers(library, asked, order, BATCH_SIZE),
        }
        results = {name: timed(run) for name, run in sides.items()}
        if number == 0:
            continue
        for name, (taken, answers) in results.items():
            seconds[name].append(taken)
            if name != "ours":
                num_different += count_differences(library, asked, results["ours"][1], answers)
                num_answers += len(answers)
        common.say(f"round {number}: " + "  ".join(f"{name} {taken:.2f} s" for name, (taken, _) in results.items()))
    report(seconds, args.num_images * QUESTIONS_PER_IMAGE, num_different, num_answers)


def report(seconds: dict[str, list[float]], num_questions: int, num_different: int, num_answers: int) -> None:
    """Print medians, and the ratios of each round's pair."""
    common.say(f"\n{num_questions} questions, {QUESTIONS_PER_IMAGE} an image, {NUM_NEW_TOKENS} tokens each, float32")
    common.say("| side | median seconds | questions/s |\n| --- | --- | --- |")
    for name, taken in seconds.items():
        common.say(f"| {name} | {common.median(taken):.2f} | {num_questions / common.median(taken):.1f} |")
    common.say(f"answers that differ after a near tie (margin below {NEAR_TIE}): {num_different} of {num_answers}")
    rounds = list(zip(*seconds.values(), strict=True))
    common.say_ratios(
        {
            "eval_loop": common.median([loop / ours for ours, loop, _, _ in rounds]),
            "eval_padded": common.median([min(padded) / ours for ours, _, *padded in rounds]),
        }
    )


if __name__ == "__main__":
    main()
