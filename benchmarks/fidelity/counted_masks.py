"""Labels of the `###` templates by the token counts of LLaVA-Med 1.0, for replays of its runs.

The original tokenizes every turn alone and counts its tokens. If `###` is one token alone and two in a text, as with
Llama's tokenizer, the count agrees with the mask of this package. With other tokenizers it drifts into the text, and
the recorded runs were trained on the drifted labels.
"""

from __future__ import annotations

from dataclasses import replace

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.conversation import Segment
from llava.data.dataset import SFTDataset
from llava.data.encode import Encoded, place_images, tokenize_segments
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, with_placeholders

NUM_LEFT_OPEN = 2
"""Tokens at the start of a question that stay trained: the separator that ends an answer."""


class CountedMaskDataset(SFTDataset):
    """Dataset with the labels of the original."""

    def __getitem__(self, row: int) -> Encoded:
        encoded = super().__getitem__(row)
        labels = counted_labels(encoded, with_placeholders(self.samples[row]), self.processor)
        return replace(encoded, labels=labels)


def counted_labels(encoded: Encoded, conversation: Conversation, processor: LlavaMedProcessor) -> tuple[int, ...]:
    """Return the labels of a row: all tokens but the system prompt and, by counting, the questions."""
    template, form = processor.template, processor.template.form
    labels = list(encoded.input_ids)
    cursor = _count(form.system.replace("{}", template.system), processor)
    labels[:cursor] = [IGNORE_INDEX] * min(cursor, len(labels))
    for turn in place_images(conversation, processor).turns:
        text = turn.text.replace(IMAGE_TOKEN, IMAGE_TOKEN.join(template.image_wrap))
        frame = form.human if turn.role == "human" else form.gpt
        count = _count("".join(part for part, _ in frame).replace("{}", text), processor)
        if turn.role == "human":
            start, stop = cursor + NUM_LEFT_OPEN, min(cursor + count, len(labels))
            labels[start:stop] = [IGNORE_INDEX] * (stop - start)
        cursor += count
    return tuple(labels)


def _count(text: str, processor: LlavaMedProcessor) -> int:
    """Return the number of tokens of a text alone, including the start token."""
    return len(tokenize_segments([Segment(text, False, 0)], processor).ids)
