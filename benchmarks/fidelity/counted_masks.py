"""Labels of the `###` templates by the token counts of LLaVA-Med 1.0, for replays of its runs.

The original tokenizes every turn alone and counts its tokens. If `###` is one token alone and two in a text, as with
Llama's tokenizer, the count agrees with the mask of this package. With other tokenizers it drifts into the text, and
the recorded runs were trained on the drifted labels.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.fidelity.published import counted_v0
from llava.data.dataset import SFTDataset
from llava.data.encode import Encoded
from llava.samples import with_placeholders


class CountedMaskDataset(SFTDataset):
    """Dataset with the labels of the original."""

    def __getitem__(self, row: int) -> Encoded:
        encoded = super().__getitem__(row)
        labels = counted_v0(encoded.input_ids, with_placeholders(self.samples[row]), self.processor)
        return replace(encoded, labels=tuple(labels))
