"""Judges without an endpoint: references, the model's use of the image, and the answers' majority.

A judge gives every answer to a question a score, or says why it has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.constants import BLANK_SIZE, GRAY
from llava.errors import DataError, LlavaError
from llava.generation.protocol import Prompt
from llava.imaging.decode import resolve_image_path
from llava.instruct.preferences.rows import Answered
from llava.scoring.choices import choices_of, is_closed_hit
from llava.scoring.decisions import DECISIONS, is_closed
from llava.scoring.overlap import token_overlap
from llava.scoring.strict import strict_pair, strict_words

if TYPE_CHECKING:
    from llava.generation.engine import LocalEngine

Scored = Sequence[float] | str
"""Score of each answer, or why there are none."""

ScoreAll = Callable[[Sequence[Answered]], list[Scored]]
"""Judge of many questions."""


def by_reference(one: Answered) -> Scored:
    """Return 1 or 0 for a closed question (strict decision), else F1 of the words of answer and reference."""
    kept = one.asked.kept
    reference = kept.get("reference")
    if not isinstance(reference, str) or not reference.strip():
        return "no reference"
    try:
        closed = is_closed(kept.get("answer_type"), reference)
    except DataError as error:
        return str(error)
    if not closed:
        return [_overlap(*strict_pair(reference, answer)) for answer in one.answers]
    choices, label = choices_of(kept)
    return [float(is_closed_hit(reference, answer, choices=choices, label=label)) for answer in one.answers]


def _overlap(reference: Sequence[str], answer: Sequence[str]) -> float:
    return token_overlap(Counter(reference), Counter(answer))[0]


def by_majority(one: Answered) -> Scored:
    """Return each answer's mean agreement with the others; with only two answers neither is the majority."""
    if len(one.answers) < 3:
        return "a majority needs at least 3 answers"
    others = len(one.answers) - 1
    return [
        sum(_agreement(answer, other) for place, other in enumerate(one.answers) if place != own) / others
        for own, answer in enumerate(one.answers)
    ]


def _agreement(answer: str, other: str) -> float:
    """Return 1 or 0 for two answers that begin with yes or no, else F1 of their words."""
    words = strict_words(answer), strict_words(other)
    decisions = [one[0] if one and one[0] in DECISIONS else None for one in words]
    if None not in decisions:
        return float(decisions[0] == decisions[1])
    return _overlap(*words)


class ImageGain:
    """Judge by log-likelihood per token of an answer with the image, minus that with a gray one."""

    def __init__(self, engine: LocalEngine, image_folder: str | Path | None) -> None:
        from PIL import Image

        self.engine = engine
        self.image_folder = image_folder
        self.blank = Image.new("RGB", (BLANK_SIZE,) * 2, GRAY)

    def __call__(self, batch: Sequence[Answered]) -> list[Scored]:
        """Return the gain of every answer; questions about one image share its tokens."""
        return [self._gains(one) for one in batch] if len(batch) == 1 else self._all(batch)

    def _all(self, batch: Sequence[Answered]) -> list[Scored]:
        try:
            prompts = [prompt for one in batch for prompt in self._prompts(one)]
            scores = iter(self._per_token(prompts))
        except LlavaError:
            return [self._gains(one) for one in batch]  # one unreadable question does not stop the others
        return [self._differences(one, [next(scores) for _ in range(2 * len(one.answers))]) for one in batch]

    def _gains(self, one: Answered) -> Scored:
        if not one.asked.images:
            return "no image"
        try:
            return self._differences(one, self._per_token(self._prompts(one)))
        except LlavaError as error:
            return str(error)

    @staticmethod
    def _differences(one: Answered, scores: Sequence[float]) -> Scored:
        if not one.asked.images:
            return "no image"
        return [shown - blank for shown, blank in zip(scores[::2], scores[1::2], strict=True)]

    def _prompts(self, one: Answered) -> list[Prompt]:
        """Return each answer beside the images and beside gray ones, in turn."""
        images = tuple(str(resolve_image_path(name, self.image_folder)) for name in one.asked.images)
        return [
            Prompt(one.asked.conversation(answer), shown)
            for answer in one.answers
            for shown in (images, (self.blank,) * len(images))
        ]

    def _per_token(self, prompts: Sequence[Prompt]) -> list[float]:
        return [score.logprob / max(score.num_tokens, 1) for score in self.engine.score(prompts)]


def each(judge: Callable[[Answered], Scored]) -> ScoreAll:
    """Return a judge of many questions that judges them one at a time."""
    return lambda batch: [judge(one) for one in batch]


DEFAULT_MARGINS = {"endpoint": 1.0, "replay": 1.0, "reference": 0.1, "image_gain": 0.0, "majority": 0.0}
"""Smallest difference of scores that is a preference, by judge."""
