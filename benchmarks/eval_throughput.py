"""Benchmark of answering: our engine against transformers' generate, one by one and in batches.

python -m benchmarks.eval_throughput [--rounds 5] [--num-images 16] [--findings]

Five questions per image, greedy, 16 new tokens, float32. The library's side gets prepared tokens and pixels; ours
starts from text and images within the measured time. The library answers in left-padded batches of 16 and of 32 (the
slots of our engine), in the order of the images and sorted by length; the fastest of them counts in every round. The
order of sides alternates.

With --findings, one question per image has an answer of log-uniform 20 to 120 tokens, as findings have; both sides
answer 8 at a time, and a padded batch runs until its longest answer ends.

All sides must give the same tokens; differences are allowed, and counted, only where the logits of the two likeliest
tokens differ by less than 1e-3.
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
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Prompt, Sampling
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Turn
from llava.utils.cli import Parser

QUESTIONS_PER_IMAGE = 5
NUM_NEW_TOKENS = 16
EOS_TOKEN_ID = 2
BATCH_SIZE, LARGE_BATCH_SIZE = 16, 32
NEAR_TIE = 1e-3
FINDINGS_TOKENS = (20, 120)
FINDINGS_BATCH = 8
"""Range of the length of findings, and the batch size of both sides for them."""

OVERHEAD = len("<s>[INST] \n [/INST]") - len("<s>") + 1
"""Tokens that the template adds to a question."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Question as input of our engine and of the library."""

    prompt: Prompt
    input_ids: Tensor
    pixels: Tensor
    limit: int = NUM_NEW_TOKENS

    def on(self, device: str) -> Asked:
        """Return the question with its tensors on a device."""
        return Asked(self.prompt, self.input_ids.to(device), self.pixels.to(device), self.limit)


def make_processor() -> LlavaMedProcessor:
    """Return a processor with one token per letter, the placeholder and 224-pixel preprocessing."""
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
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return LlavaMedProcessor(
        tokenizer, image_processor, template="mistral_instruct", num_image_tokens=common.NUM_IMAGE_TOKENS
    )


def make_questions(engine: LocalEngine, num_images: int, seed: int, *, findings: bool = False) -> list[Asked]:
    """Return random questions in the order of their images: five per image, or one with a long answer."""
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    shortest, longest = common.TEXT_TOKENS
    asked = []
    for _ in range(num_images):
        image = Image.fromarray(noise.integers(0, 256, (common.IMAGE_SIZE,) * 2 + (3,), dtype=np.uint8))
        pixels = engine.processor.pixels([image])
        for _ in range(1 if findings else QUESTIONS_PER_IMAGE):
            length = round(shortest * (longest / shortest) ** draw.random())
            text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=max(1, length - OVERHEAD)))
            prompt = Prompt(Conversation((Turn("human", f"<image>\n{text}"),)), (image,))
            ids = engine.reader.read(prompt).encoded.input_ids
            low, high = FINDINGS_TOKENS
            limit = round(low * (high / low) ** draw.random()) if findings else NUM_NEW_TOKENS
            asked.append(Asked(prompt, torch.tensor([ids]), pixels, limit))
    return asked


def left_padded(batch: Sequence[Asked]) -> dict[str, Tensor]:
    """Return the inputs of a usual evaluation script."""
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
    """Return the tokens of transformers for each question, asked in `order`, up to the end token."""
    answers: list[list[int]] = [[]] * len(asked)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        inputs = left_padded([asked[number] for number in numbers])
        output = model.generate(
            **inputs,
            max_new_tokens=max(asked[number].limit for number in numbers),
            do_sample=False,
            eos_token_id=EOS_TOKEN_ID,
            pad_token_id=common.PAD_TOKEN_ID,
        )
        for number, row in zip(numbers, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            kept = row[: asked[number].limit]
            answers[number] = kept[: kept.index(EOS_TOKEN_ID) + 1] if EOS_TOKEN_ID in kept else kept
    return answers


def our_answers(engine: LocalEngine, asked: Sequence[Asked]) -> list[list[int]]:
    """Return the tokens of our engine for each question."""
    sampling = [Sampling(max_new_tokens=one.limit) for one in asked]
    completions = engine.generate([one.prompt for one in asked], sampling)
    return [list(completion.token_ids) for [completion] in completions]


@torch.no_grad()
def count_differences(
    model: LlavaForConditionalGeneration, asked: Sequence[Asked], ours: list[list[int]], theirs: list[list[int]]
) -> int:
    """Return the number of answers that differ after a near tie.

    Raises:
        AssertionError: two answers differ without a near tie, or one ends before the other.
    """
    num_different = 0
    for one, our, their in zip(asked, ours, theirs, strict=True):
        place = next((i for i, pair in enumerate(zip(our, their, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            assert len(our) == len(their), f"equal tokens, but {len(our)} of ours against {len(their)}"
            continue
        num_different += 1
        ids = torch.cat([one.input_ids, one.input_ids.new_tensor([our[:place]])], dim=1)
        logits = model(input_ids=ids, pixel_values=one.pixels, use_cache=False).logits[0, -1]
        best = logits.topk(2).values
        margin = float(best[0] - best[1])
        assert margin < NEAR_TIE, f"different tokens, although the logits of the two likeliest differ by {margin:.2g}"
    return num_different


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Return seconds and result of a run."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def sides_of(
    engine: LocalEngine, library: LlavaForConditionalGeneration, asked: Sequence[Asked]
) -> dict[str, Callable[[], list[list[int]]]]:
    """Return the sides by name: ours, one by one, then padded batches."""
    in_order = list(range(len(asked)))
    by_length = sorted(in_order, key=lambda index: asked[index].input_ids.shape[1])
    if asked[0].limit != NUM_NEW_TOKENS:
        return {
            "ours": lambda: our_answers(engine, asked),
            f"padded, {FINDINGS_BATCH}": lambda: library_answers(library, asked, in_order, FINDINGS_BATCH),
            f"padded, {FINDINGS_BATCH}, by length": lambda: library_answers(library, asked, by_length, FINDINGS_BATCH),
        }
    return {
        "ours": lambda: our_answers(engine, asked),
        "one at a time": lambda: library_answers(library, asked, in_order, 1),
        f"padded, {BATCH_SIZE}": lambda: library_answers(library, asked, in_order, BATCH_SIZE),
        f"padded, {BATCH_SIZE}, by length": lambda: library_answers(library, asked, by_length, BATCH_SIZE),
        f"padded, {LARGE_BATCH_SIZE}, by length": lambda: library_answers(library, asked, by_length, LARGE_BATCH_SIZE),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rounds and print the table."""
    parser = Parser(prog="python -m benchmarks.eval_throughput", description="Answering, ours and transformers'.")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--num-images", type=int, default=16, help="images per round, with five questions each")
    parser.add_switch("--findings", help="one question per image, with answers of 20 to 120 tokens")
    parser.add_switch("--quick", help="one round of four images, as a test of equal answers")
    args = parser.parse_args(argv)
    num_rounds, num_images = (1, 4) if args.quick else (args.rounds, args.num_images)
    common.say(common.machine())
    ours = common.our_model().eval()
    library = common.library_model(ours).eval()
    num_slots = FINDINGS_BATCH if args.findings else LARGE_BATCH_SIZE
    engine = LocalEngine(ours, make_processor(), max_slots=num_slots)
    rounds: list[dict[str, float]] = []
    num_different = num_answers = 0
    # The first round warms up and is not counted.
    for number in range(num_rounds + 1):
        asked = make_questions(engine, num_images, seed=number, findings=args.findings)
        sides = sides_of(engine, library, asked)
        names = list(sides) if number % 2 else list(reversed(sides))
        results = {name: timed(sides[name]) for name in names}
        if number == 0:
            continue
        rounds.append({name: results[name][0] for name in sides})
        for name, (_, answers) in results.items():
            if name != "ours":
                num_different += count_differences(library, asked, results["ours"][1], answers)
                num_answers += len(answers)
        common.say(f"round {number}: " + "  ".join(f"{name} {taken:.2f} s" for name, taken in rounds[-1].items()))
    if args.findings:
        what = f"{num_images} questions, 1 per image, {FINDINGS_TOKENS[0]} to {FINDINGS_TOKENS[1]} tokens each, float32"
    else:
        what = f"{len(asked)} questions, {QUESTIONS_PER_IMAGE} per image, {NUM_NEW_TOKENS} tokens each, float32"
    report(rounds, what, len(asked), num_different, num_answers)


def report(
    rounds: Sequence[dict[str, float]], what: str, num_questions: int, num_different: int, num_answers: int
) -> None:
    """Print medians over the rounds, and the medians of each round's ratios."""
    common.say(f"\n{what}")
    common.say("| side | median seconds | questions/s | ours is faster by |\n| --- | --- | --- | --- |")
    for name in rounds[0]:
        seconds = common.median([taken[name] for taken in rounds])
        ratio = common.median([taken[name] / taken["ours"] for taken in rounds])
        common.say(f"| {name} | {seconds:.2f} | {num_questions / seconds:.1f} | {ratio:.2f} |")
    common.say(f"answers that differ after a near tie (margin below {NEAR_TIE}): {num_different} of {num_answers}")
    values = [list(taken.values()) for taken in rounds]
    if "one at a time" not in rounds[0]:
        common.say_ratios({"findings_padded": common.median([min(padded) / ours for ours, *padded in values])})
        return
    common.say_ratios(
        {
            "eval_loop": common.median([loop / ours for ours, loop, *_ in values]),
            "eval_padded": common.median([min(padded) / ours for ours, _, *padded in values]),
        }
    )


if __name__ == "__main__":
    main()
