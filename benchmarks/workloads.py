"""Training workloads, and the orders in which a peer reads them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.common import Questions, random_questions
from llava.data.encode import Encoded

BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Workload:
    """Workload: questions per image, and the number of trained answer tokens of a text."""

    questions_per_image: int
    answer_tokens: Callable[[random.Random, int], int]
    about: str

    def questions(self, num_batches: int) -> Questions:
        """Return the sequences of `num_batches` batches of 16, in the order of their images."""
        num_images = num_batches * BATCH_SIZE // self.questions_per_image
        return random_questions(num_images, self.questions_per_image, self.answer_tokens)


WORKLOADS: dict[str, Workload] = {
    "8q": Workload(
        8, lambda draw, length: draw.randint(2, min(6, length)), "8 questions per image, answers of 2 to 6 tokens"
    ),
    "1q": Workload(1, lambda draw, length: length // 2, "1 question per image, half of the text is the answer"),
}


def batches(sequences: list[Encoded]) -> list[list[Encoded]]:
    """Return sequences in batches of 16."""
    return [sequences[start : start + BATCH_SIZE] for start in range(0, len(sequences), BATCH_SIZE)]


def shuffled(sequences: list[Encoded]) -> list[list[Encoded]]:
    """Return batches in random order."""
    order = list(sequences)
    random.Random(1).shuffle(order)
    return batches(order)


def length_grouped(sequences: list[Encoded]) -> list[list[Encoded]]:
    """Return batches of similar length, longest first, as by transformers' length-grouped sampler."""
    order = list(sequences)
    random.Random(1).shuffle(order)
    return batches(sorted(order, key=lambda sequence: -len(sequence.input_ids)))


PEER_ORDERS: dict[str, Callable[[list[Encoded]], list[list[Encoded]]]] = {
    "random": shuffled,
    "length-grouped": length_grouped,
}
