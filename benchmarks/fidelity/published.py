"""What the original trainers did to labels where they were wrong, recomputed: it is known then what was recorded."""

from __future__ import annotations

from collections.abc import Sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.conversation import Segment
from llava.data.encode import place_images, tokenize_segments
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation


def counted_v0(ids: Sequence[int], conversation: Conversation, processor: LlavaMedProcessor) -> list[int]:
    """Labels by the published arithmetic of the `###` form: every turn tokenized alone, its tokens counted.

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
    """Number of ids of a text tokenized alone, begin of text included."""
    return len(tokenize_segments([Segment(text, False, 0)], processor).ids)


def counted_patches(width: int, height: int, processor: LlavaMedProcessor) -> int:
    """Tokens of a picture in image mode `keep` as the first version counts them.

    It takes the side of a patch from the picture's own height, as if that always were as many patches as a tile has.
    """
    patch = height // processor.image_grid.side
    return (height // patch) * (width // patch)


def is_v0(processor: LlavaMedProcessor) -> bool:
    """Whether the template is of the `###` form."""
    return processor.template.form.closing == "### "


def is_shifted(ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether every trained stretch begins and ends up to one token off: a count that drifts by one a turn."""
    mine, recorded = _stretches(ours), _stretches(theirs)
    return len(mine) == len(recorded) and all(
        abs(a - b) <= 1 and abs(c - d) <= 1 for (a, c), (b, d) in zip(mine, recorded, strict=True)
    )


def _stretches(labels: Sequence[int]) -> list[tuple[int, int]]:
    """`(first, stop)` of the stretches of trained tokens."""
    trained = [label != IGNORE_INDEX for label in (IGNORE_INDEX, *labels, IGNORE_INDEX)]
    edges = [place for place in range(1, len(trained)) if trained[place] != trained[place - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))
