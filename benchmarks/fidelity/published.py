"""Recomputation of known label defects of the original trainers, to explain recorded labels."""

from __future__ import annotations

from collections.abc import Sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.conversation import Segment
from llava.data.encode import place_images, tokenize_segments
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation


def counted_v0(ids: Sequence[int], conversation: Conversation, processor: LlavaMedProcessor) -> list[int]:
    """Return labels by the published arithmetic of the `###` form: tokens of every turn counted alone.

    `###` may be fewer tokens in the text than alone; the count then drifts.
    """
    form, template = processor.template.form, processor.template
    turns = place_images(conversation, processor).turns
    alone: list[str] = [form.system.replace("{}", template.system)]
    for turn in turns:
        text = turn.text.replace(IMAGE_TOKEN, IMAGE_TOKEN.join(template.image_wrap))
        frame = form.human if turn.role == "human" else form.gpt
        alone.append("".join(part for part, _ in frame).replace("{}", text))
    counts = [_count_alone(text, processor) for text in alone]
    labels = list(ids)
    labels[: counts[0]] = [IGNORE_INDEX] * counts[0]
    cursor = counts[0]
    for turn, count in zip(turns, counts[1:], strict=True):
        if turn.role == "human":
            stop = min(cursor + count, len(labels))
            labels[cursor + 2 : stop] = [IGNORE_INDEX] * (stop - cursor - 2)
        cursor += count
    return labels


def _count_alone(text: str, processor: LlavaMedProcessor) -> int:
    """Return the number of ids of a text tokenized alone, including the start token."""
    return len(tokenize_segments([Segment(text, False, 0)], processor).ids)


def counted_patches(width: int, height: int, processor: LlavaMedProcessor) -> int:
    """Return the number of tokens of an image in mode `keep` as LLaVA-Med 1.0 counts them.

    It derives the side of a patch from the height of the image, as if every image were as many patches high as a tile.
    """
    patch = height // processor.image_grid.side
    return (height // patch) * (width // patch)


def is_v0(processor: LlavaMedProcessor) -> bool:
    """Return whether the template has the `###` form."""
    return processor.template.form.closing == "### "


def is_shifted(ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Return whether every trained run begins and ends up to one token off (a count that drifts)."""
    mine, recorded = _trained_runs(ours), _trained_runs(theirs)
    return len(mine) == len(recorded) and all(
        abs(a - b) <= 1 and abs(c - d) <= 1 for (a, c), (b, d) in zip(mine, recorded, strict=True)
    )


def _trained_runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return `(first, stop)` of the runs of trained tokens."""
    trained = [label != IGNORE_INDEX for label in (IGNORE_INDEX, *labels, IGNORE_INDEX)]
    edges = [place for place in range(1, len(trained)) if trained[place] != trained[place - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))
