"""Conversation to tokens and labels: the only place that tokenizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenized conversation; every field but `images` and `num_cut` runs over its T tokens.

    Attributes:
        input_ids: token ids, each image already expanded to its place-holder tokens.
        labels: `input_ids[t]` where token t is trained, else -100.
        turns: index of the conversation turn that token t was rendered from, -1 for the system text.
        image_spans: for each image `(start, stop)` of its place-holder tokens, in order.
        images: for each image its identity (hash of bytes and preprocessing); equal keys are equal model inputs.
        num_cut: tokens that truncation removed.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    turns: tuple[int, ...]
    image_spans: tuple[tuple[int, int], ...] = ()
    images: tuple[str, ...] = ()
    num_cut: int = 0
