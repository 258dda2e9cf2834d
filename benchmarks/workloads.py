"""The two training workloads and the orders in which a peer may read them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.common import Questions, random_questions
from llava.data.encode import Encoded

BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Workload:
    """Questions about images; how many of a text's tokens are its trained answer."""

    questions_per_image: int
    answer_tokens: Callable[[random.Random, int], int]
    about: str

    def questions(self, num_batches: int) -> Questions:
        """So many batches of 16 sequences, in the order of their images."""
        num_images = num_batches * BATCH_SIZE // self.questions_per_image
        return random_questions(num_images, self.questions_per_image, self.answer_tokens)


WORKLOADS: dict[str, Workload] = {
    "8q": Workload(
        8, lambda draw, length: draw.randint(2, min(6, length)), "8 questions an image, answers 2 to 6 tokens"
    ),
    "1q": Workload(1, lambda draw, length: length // 2, "1 question an image, half of the text is the answer"),
}


def batches(sequences: list[Encoded]) -> list[list[Encoded]]:
    """Cut into batches of 16."""
    return [sequences[start : start + BATCH_SIZE] for start in range(0, len(sequences), BATCH_SIZE)]


def shuffled(sequences: list[Encoded]) -> list[list[Encoded]]:
    """Random order."""
    order = list(sequences)
    random.Random(1).shuffle(order)
    return batches(order)


def length_grouped(sequences: list[Encoded]) -> list[list[Encoded]]:
    """Sequences of like length together, longest first, as transformers' length-grouped sampler sorts."""
    order = list(sequences)
    random.Random(1).shuffle(order)
    return batches(sorted(order, key=lambda sequence: -len(sequence.input_ids)))


PEER_ORDERS: dict[str, Callable[[list[Encoded]], list[list[Encoded]]]] = {
    "random": shuffled,
    "length-grouped": length_grouped,
}
