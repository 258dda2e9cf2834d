"""Each image needs a place in the text: counted here, and given one where a row marks none."""

from __future__ import annotations

from dataclasses import replace

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.samples import Conversation, Sample, name_of


def with_places(sample: Sample) -> Conversation:
    """Return the sample's conversation with exactly one `<image>` per image.

    A row that names images but marks no place gets them in front of its first question, as the LLaVA trainers do.

    Raises:
        DataError: the number of place holders differs from the number of images; names the row.
    """
    conversation, num_images = sample.conversation, len(sample.images)
    num_places = sum(turn.text.count(IMAGE_TOKEN) for turn in conversation.turns)
    if num_places == num_images:
        return conversation
    if num_places == 0:
        first = conversation.turns[0]
        text = f"{IMAGE_TOKEN}\n" * num_images + first.text
        return replace(conversation, turns=(replace(first, text=text), *conversation.turns[1:]))
    hint = "the row names no image" if num_images == 0 else f"it names {num_images} image(s)"
    raise DataError(
        f"{name_of(sample)}: the text has {num_places} place holder(s) {IMAGE_TOKEN} but {hint}; "
        f"expected one per image, or none to have them put in front"
    )
