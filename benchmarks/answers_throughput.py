"""Benchmark of sampled answers, as preferences need them: our engine against one `generate` call for each answer.

python -m benchmarks.answers_throughput [--rounds 1] [--num-images 64]

Five questions per image, two sampled answers of 16 new tokens to each (temperature 1.2, top_k 100, top_p 0.95), the
24M-parameter model in float32. The library gets prepared tokens and pixels; ours starts from text and images within the
measured time. Draws differ, so the sides are compared on greedy answers to some of the questions, which must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlavaForConditionalGeneration

from benchmarks import common
from benchmarks.eval_throughput import (
    EOS_TOKEN_ID,
    LARGE_BATCH_SIZE,
    NUM_NEW_TOKENS,
    Asked,
    count_differences,
    left_padded,
    library_answers,
    make_processor,
    make_questions,
    our_answers,
    timed,
)
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Sampling
from llava.utils.cli import Parser

NUM_ANSWERS = 2
TEMPERATURE, TOP_K, TOP_P = 1.2, 100, 0.95
NUM_COMPARED = 10
"""Questions whose greedy answers must be equal."""


@torch.no_grad()
def library_samples(model: LlavaForConditionalGeneration, asked: Sequence[Asked]) -> list[list[int]]:
    """Return two sampled answers of transformers to each question, one call for each."""
    found = []
    for one in asked:
        inputs = left_padded([one])
        for _ in range(NUM_ANSWERS):
            output = model.generate(
                **inputs,
                max_new_tokens=NUM_NEW_TOKENS,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=TOP_K,
                top_p=TOP_P,
                eos_token_id=EOS_TOKEN_ID,
                pad_token_id=common.PAD_TOKEN_ID,
            )
            found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def our_samples(engine: LocalEngine, asked: Sequence[Asked], seed: int) -> list[list[int]]:
    """Return two sampled answers of our engine to each question."""
    sampling = Sampling(
        max_new_tokens=NUM_NEW_TOKENS, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P, n=NUM_ANSWERS, seed=seed
    )
    answered = engine.generate([one.prompt for one in asked], sampling)
    return [list(completion.token_ids) for completions in answered for completion in completions]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rounds and print the table."""
    parser = Parser(prog="python -m benchmarks.answers_throughput", description="Sampled answers to questions.")
    parser.add_argument("--rounds", type=int, default=1, help="number of measured rounds")
    parser.add_argument("--num-images", type=int, default=64, help="images per round, with five questions each")
    args = parser.parse_args(argv)
    common.say(common.machine())
    ours = common.our_model().eval()
    library = common.library_model(ours).eval()
    engine = LocalEngine(ours, make_processor(), max_slots=LARGE_BATCH_SIZE)
    seconds: dict[str, list[float]] = {"ours": [], "one call for each answer": []}
    for number in range(args.rounds):
        asked = make_questions(engine, args.num_images, seed=number)
        some = asked[:NUM_COMPARED]
        greedy = library_answers(library, some, range(len(some)), 1)
        num_different = count_differences(library, some, our_answers(engine, some), greedy)
        for name, (taken, answers) in {
            "ours": timed(lambda questions=asked, seed=number: our_samples(engine, questions, seed)),
            "one call for each answer": timed(lambda questions=asked: library_samples(library, questions)),
        }.items():
            assert len(answers) == NUM_ANSWERS * len(asked), name
            seconds[name].append(taken)
        common.say(f"round {number + 1}: {num_different} of {len(some)} greedy answers differ after a near tie")
    common.say(f"\n{len(asked)} questions, {NUM_ANSWERS} answers to each, {NUM_NEW_TOKENS} tokens, float32")
    common.say("| side | median seconds | answers/s |\n| --- | --- | --- |")
    for name, taken in seconds.items():
        median = common.median(taken)
        common.say(f"| {name} | {median:.2f} | {NUM_ANSWERS * len(asked) / median:.1f} |")
    own, others = seconds.values()
    common.say_ratios({"answers_loop": common.median([b / a for a, b in zip(own, others, strict=True)])})


if __name__ == "__main__":
    main()
