"""Training of a reward model on preference pairs (`--objective reward`), factually augmented if asked.

pairs --rating question with the captions of the image--> sequences --ValueModel--> reward of the last token

A reward model rates an answer with the facts before it: the rating question holds the captions of the image, so that an
answer that contradicts them differs from one that does not (2309.14525).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from llava.data.encode import Encoded, Unit, encode_prompt
from llava.data.preference import PreferenceDataset
from llava.errors import ConfigError, DataError
from llava.samples import Conversation, Preference, Turn, with_placeholders
from llava.train.specs import RatingSpec
from llava.utils.jsonl import read_object, read_text

SLOT = "{factual_prompt}"
"""Place of the captions in the text of a rating question."""

LEAD = "The answer must be supported by these facts about the image:"

D = TypeVar("D")

Captions = Mapping[str, Sequence[str]]


def rating_question(prompt: str, captions: Sequence[str]) -> str:
    """Return the rating question with the captions in its slot."""
    return prompt.replace(SLOT, "\n".join([LEAD, *(f"  - {caption}" for caption in captions)]))


def read_captions(path: str | Path) -> Captions:
    """Return the captions of each image of a JSON object `{image: [captions]}`.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    found = read_object(path)
    for image, captions in found.items():
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise DataError(f"{path}: {image[:80]!r}: expected a list of captions")
    return found


class RatedPairs(PreferenceDataset):
    """Pairs whose conversations end with a rating question; made from pairs by `of`.

    Attributes:
        prompt: text of the rating question; empty for none.
        captions: captions of each image.
    """

    prompt: str = ""
    captions: Captions

    @classmethod
    def of(cls, pairs: PreferenceDataset, prompt: str, captions: Captions) -> Self:
        """Return the pairs with a rating question.

        Raises:
            DataError: the question has a slot for captions, and an image has none.
        """
        made = copy.copy(pairs)
        made.__class__ = cls
        found = cast(Self, made)
        found.prompt, found.captions = prompt, captions
        for pair in found.preferences:
            found._question(pair)
        return found

    def _question(self, pair: Preference) -> str:
        captions = [caption for image in pair.images for caption in self.captions.get(image, ())]
        if SLOT in self.prompt and not captions:
            where = pair.origin or f"id {pair.id!r}"
            raise DataError(f"{where}: image {', '.join(pair.images)[:80]!r} has no captions; add them to the file")
        return rating_question(self.prompt, captions)

    def _encode(self, pair: Preference) -> Unit:
        if not self.prompt:
            return super()._encode(pair)
        return tuple(replace(self._rated(side, pair), weight=pair.weight) for side in pair.sides())

    def _rated(self, side: Any, pair: Preference) -> Encoded:
        answered = with_placeholders(replace(side, origin=None))
        turns = (*answered.turns, Turn("human", self._question(pair)))
        keys = [self.store.key(name) for name in pair.images]
        found = encode_prompt(
            Conversation(turns, answered.system), self.processor, images=keys, sizes=self.store.sizes(pair.images)
        )
        if self.max_length is not None and len(found.input_ids) > self.max_length:
            raise DataError(
                f"conversation and rating question have {len(found.input_ids)} tokens, more than the maximum length of "
                f"{self.max_length}; raise --model-max-length"
            )
        return found


def with_rating(pairs: D, spec: RatingSpec | None) -> D:
    """Return pairs with the rating question of a reward model, where one is given; other data as they are.

    Raises:
        ConfigError: captions are given without a question that has a slot for them, or the reverse.
        DataError: a file is unusable, or an image has no captions.
    """
    if spec is None:
        return pairs
    if spec.prompt_file is None:
        if spec.caption_file is not None:
            raise ConfigError("--image-to-caption-file has an effect only with --reward-prompt-file; set both")
        return pairs
    assert isinstance(pairs, PreferenceDataset)
    prompt = read_text(spec.prompt_file).strip()
    if (SLOT in prompt) != (spec.caption_file is not None):
        raise ConfigError(
            f"--reward-prompt-file {spec.prompt_file}: a question with {SLOT} and --image-to-caption-file need each "
            "other"
        )
    captions = {} if spec.caption_file is None else read_captions(spec.caption_file)
    return cast(D, RatedPairs.of(pairs, prompt, captions))
