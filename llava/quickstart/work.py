"""Amount of work of a quickstart: sizes of the models, and rows and tokens of the data.

given or built-in parts --config--> LanguageShape, TowerShape
number of drawings, or the rows of --data --counted--> Rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from llava.data.records import load_samples
from llava.quickstart.settings import QuickstartSettings
from llava.samples import Sample

CHARACTERS_PER_TOKEN = 4.0
"""Characters per token of English text; rows of `--data` are counted before their tokenizer is loaded."""

TEMPLATE_TOKENS = 12
"""Tokens that a conversation template adds to a question and its answer."""

# Counted with the tokenizer of SmolLM2 on 480 drawings of seed 0.
DRAWING_CAPTION_TOKENS = 22.7
DRAWING_QUESTIONS = 5.9
DRAWING_QUESTION_TOKENS = 20.5
DRAWING_ANSWER_TOKENS = 2.4
DRAWING_TEST_QUESTIONS = 5.4
DRAWING_LONGEST_ANSWER = 3.0

PATCH_SIZE = 14


@dataclass(frozen=True, slots=True)
class LanguageShape:
    """Sizes of a Llama-like language model; the defaults are those of SmolLM2-135M."""

    hidden: int = 576
    intermediate: int = 1536
    layers: int = 30
    key_value: int = 192
    vocabulary: int = 49152

    @property
    def linear_layers(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the linear layers of one block."""
        hidden, wide = self.hidden, self.intermediate
        attention = ((hidden, hidden), (hidden, self.key_value), (hidden, self.key_value), (hidden, hidden))
        return (*attention, (hidden, wide), (hidden, wide), (wide, hidden))

    @property
    def config(self) -> dict[str, int]:
        """Sizes by their names in a model's configuration."""
        return {"hidden_size": self.hidden, "intermediate_size": self.intermediate}

    @property
    def blocks(self) -> int:
        """Number of weights of all blocks."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_layers)

    @property
    def head(self) -> int:
        """Number of weights of the output layer."""
        return self.hidden * self.vocabulary

    def lora(self, rank: int) -> int:
        """Return the number of LoRA weights on all linear layers."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linear_layers)


@dataclass(frozen=True, slots=True)
class TowerShape:
    """Sizes of a vision transformer; the defaults are those of DINOv2-Small."""

    weights: int = 12 * 12 * 384 * 384
    tokens: int = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the stages and their text tokens.

    Attributes:
        drawings: number of images to draw.
        train_images: number of distinct training images.
        captions: number of rows of the alignment.
        caption_tokens: tokens of all these rows.
        questions: number of rows of the tuning.
        question_tokens: tokens of all these rows, including their answers.
        answer_tokens: tokens of their answers alone.
        test_images: number of distinct test images.
        test_questions: number of questions about them.
        test_tokens: tokens of all these questions.
        test_answer_tokens: tokens of all their reference answers.
        longest_answer: tokens of the longest reference answer.
    """

    drawings: int
    train_images: int
    captions: int
    caption_tokens: float
    questions: float
    question_tokens: float
    answer_tokens: float
    test_images: int
    test_questions: float
    test_tokens: float
    test_answer_tokens: float
    longest_answer: float


def drawn(num_train: int, num_test: int) -> Rows:
    """Return the expected rows of a drawn data set."""
    questions, test = num_train * DRAWING_QUESTIONS, num_test * DRAWING_TEST_QUESTIONS
    return Rows(
        drawings=num_train + num_test,
        train_images=num_train,
        captions=num_train,
        caption_tokens=num_train * DRAWING_CAPTION_TOKENS,
        questions=questions,
        question_tokens=questions * DRAWING_QUESTION_TOKENS,
        answer_tokens=questions * DRAWING_ANSWER_TOKENS,
        test_images=num_test,
        test_questions=test,
        test_tokens=test * DRAWING_QUESTION_TOKENS,
        test_answer_tokens=test * DRAWING_ANSWER_TOKENS,
        longest_answer=DRAWING_LONGEST_ANSWER,
    )


def rows_in(folder: Path) -> Rows:
    """Return the rows of a folder in LLaVA format; tokens are estimated from the number of characters.

    Raises:
        DataError: a file cannot be read.
    """
    train, test = load_samples(folder / "train.json"), load_samples(folder / "test.json")
    # Without captions, the alignment uses the training rows or facts from them.
    captions = load_samples(folder / "captions.json") if (folder / "captions.json").is_file() else train
    return Rows(
        drawings=0,
        train_images=_images(train),
        captions=len(captions),
        caption_tokens=sum(map(_tokens, captions)),
        questions=len(train),
        question_tokens=sum(map(_tokens, train)),
        answer_tokens=sum(map(_answer_tokens, train)),
        test_images=_images(test),
        test_questions=len(test),
        test_tokens=sum(map(_tokens, test)),
        test_answer_tokens=sum(map(_answer_tokens, test)),
        longest_answer=max(map(_answer_tokens, test), default=0.0),
    )


def _images(samples: list[Sample]) -> int:
    return len({image for sample in samples for image in sample.images})


def _tokens(sample: Sample) -> float:
    turns = sample.conversation.turns
    return sum(len(turn.text) for turn in turns) / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS * len(turns) / 2


def _answer_tokens(sample: Sample) -> float:
    return sum(len(turn.text) / CHARACTERS_PER_TOKEN + 1 for turn in sample.conversation.turns[1::2])


def rows_of(settings: QuickstartSettings) -> Rows:
    """Return the rows of a run.

    Raises:
        DataError: a file of `--data` cannot be read.
    """
    rows = drawn(settings.num_train, settings.num_test) if settings.data is None else rows_in(settings.data)
    return replace(
        rows,
        questions=rows.questions * settings.epochs,
        question_tokens=rows.question_tokens * settings.epochs,
        answer_tokens=rows.answer_tokens * settings.epochs,
    )


def language_shape(lm: str | None) -> LanguageShape | None:
    """Return the sizes of a language model; None if its configuration cannot be read or lacks them."""
    if lm is None:
        return LanguageShape()
    config = _config(lm)
    config = getattr(config, "text_config", config)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    values = [getattr(config, name, None) for name in names]
    if not _are_counts(values):
        return None
    hidden, layers, heads, vocabulary = values
    key_value = hidden * (getattr(config, "num_key_value_heads", None) or heads) // heads
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    return LanguageShape(hidden, wide, layers, key_value, vocabulary)


def tower_shape(tower: str | None, image_size: int) -> TowerShape | None:
    """Return the sizes of a vision tower; None if its configuration cannot be read or lacks them."""
    if tower is None:
        return TowerShape(tokens=(image_size // PATCH_SIZE) ** 2)
    config = _config(tower)
    config = getattr(config, "vision_config", config)
    names = ("hidden_size", "num_hidden_layers", "image_size", "patch_size")
    values = [getattr(config, name, None) for name in names]
    if not _are_counts(values):
        return None
    width, layers, side, patch = values
    return TowerShape(weights=12 * layers * width * width, tokens=(side // patch) ** 2)


def _are_counts(values: Sequence[Any]) -> TypeGuard[Sequence[int]]:
    return all(isinstance(value, int) and value > 0 for value in values)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return None
