"""Forecast of every stage from the measured speed and the amount of work, and the size of run that fits.

operations of a stage / (measured rate x share of it that the stage reaches) + seconds that do not scale
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llava.quickstart.machine import Machine
from llava.quickstart.settings import AUTO, Settings
from llava.quickstart.work import LanguageShape, Rows, TowerShape, rows_of

LORA_RANK = 16
NUM_CALIBRATION_IMAGES = 64
SPARE_TOKENS = 4
"""Tokens that an answer may be longer than the longest reference."""

FIT_SECONDS = 6 * 60.0
"""The largest size whose forecast is below this is taken; the smallest, if none is."""

# Share of the measured rate that the stages reach, and the seconds that each takes whatever the size: measured on two
# AVX2 cores in float32, by the seconds of whole runs.
ALIGN_SHARE, TUNE_SHARE, PROMPT_SHARE, DECODE_SHARE = 0.6, 0.5, 0.7, 0.2
DRAWING_SECONDS = 0.012
FIXED_SECONDS = {"parts": 16.0, "data": 0.5, "before": 8.0, "align": 5.0, "tune": 9.0, "after": 4.0, "page": 2.0}

FORWARD, BACKWARD = 2, 2
"""Operations a weight and token; gradients of weights, where these train, count as much as the backward pass again."""


@dataclass(frozen=True, slots=True)
class Size:
    """A size of run: how many drawings to train on, in as many steps as every other size."""

    name: str
    num_train: int
    captions_per_step: int
    questions_per_step: int


SIZES = (Size("full", 480, 8, 48), Size("medium", 360, 6, 36), Size("small", 240, 4, 24))
"""From the largest to the smallest. Each has the unseen drawings of the others: the intervals need them."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Operations of what the stages do with a language model and a tower."""

    language: LanguageShape
    tower: TowerShape

    def seen(self, images: float) -> float:
        """Return the operations of the tower."""
        return FORWARD * self.tower.weights * (self.tower.tokens + 1) * images

    def prompts(self, images: float, text_tokens: float) -> float:
        """Return the operations of reading questions, those about one image together."""
        return FORWARD * self.language.blocks * (images * self.tower.tokens + text_tokens)

    def decoded(self, tokens: float) -> float:
        """Return the operations of writing answers."""
        return FORWARD * (self.language.blocks + self.language.head) * tokens

    def trained(self, images: float, text_tokens: float, targets: float, adapters: int = 0) -> float:
        """Return the operations of training on rows, those about one image together.

        Args:
            images: seen by the language model.
            text_tokens: of all rows.
            targets: tokens that are predicted.
            adapters: weights of LoRA.
        """
        body = (FORWARD + BACKWARD) * self.language.blocks + (FORWARD + 2 * BACKWARD) * adapters
        head = (FORWARD + BACKWARD) * self.language.head
        return body * (images * self.tower.tokens + text_tokens) + head * targets


def stage_seconds(
    settings: Settings, machine: Machine, language: LanguageShape, tower: TowerShape, rows: Rows
) -> dict[str, float]:
    """Return the seconds forecast for each stage.

    Args:
        settings: of the run.
        machine: what was measured.
        language: sizes of the language model.
        tower: sizes of the vision tower.
        rows: what the run goes through.
    """
    costs = Costs(language, tower)
    prompt, decode = machine.rate * PROMPT_SHARE, machine.rate * DECODE_SHARE
    asked = min(settings.num_before, rows.test_questions)
    images_asked, tokens_asked = min(rows.test_images, asked), rows.test_tokens * asked / max(1.0, rows.test_questions)
    before = costs.seen(NUM_CALIBRATION_IMAGES + images_asked) + costs.prompts(images_asked, tokens_asked)
    # On the gray image all questions share one image.
    prompts_after = costs.prompts(rows.test_images, rows.test_tokens) + costs.prompts(1, rows.test_tokens)
    captions = costs.trained(rows.captions, rows.caption_tokens, rows.caption_tokens)
    images_tuned, adapters = rows.train_images * settings.epochs, language.lora(LORA_RANK)
    questions = costs.trained(images_tuned, rows.question_tokens, rows.answer_tokens, adapters)
    scaling = {
        "data": rows.drawings * DRAWING_SECONDS,
        "before": before / prompt + costs.decoded(asked * (rows.longest_answer + SPARE_TOKENS)) / decode,
        "align": captions / (machine.rate * ALIGN_SHARE) + costs.seen(rows.train_images) / prompt,
        "tune": questions / (machine.rate * TUNE_SHARE),
        "after": (costs.seen(rows.test_images) + prompts_after) / prompt
        + 2 * costs.decoded(rows.test_answer_tokens) / decode,
    }
    return {name: fixed + scaling.get(name, 0.0) for name, fixed in FIXED_SECONDS.items()}


def choose(settings: Settings, machine: Machine, language: LanguageShape, tower: TowerShape) -> tuple[Settings, str]:
    """Return the settings with the largest size that fits, and the reason in a sentence.

    What the user has given is never changed: then there is no size to choose.
    """
    if settings.size != AUTO:
        what = "the rows of --data" if settings.data is not None else f"--num-train {settings.num_train}"
        return settings, f"Size as given: {what}."
    tried: list[str] = []
    for size in SIZES:
        sized = with_size(settings, size)
        total = sum(stage_seconds(sized, machine, language, tower, rows_of(sized)).values())
        tried.append(f"{size.name} ({size.num_train} drawings) {minutes(total)}")
        if total <= FIT_SECONDS or size is SIZES[-1]:
            break
    fits = "it fits into" if total <= FIT_SECONDS else "the smallest; none fits into"
    reason = f"Size {size.name}, {size.num_train} drawings to train on: {fits} {minutes(FIT_SECONDS)}"
    return sized, f"{reason} (forecast: {', '.join(tried)})."


def with_size(settings: Settings, size: Size) -> Settings:
    """Return the settings at a size."""
    return replace(
        settings,
        size=size.name,
        num_train=size.num_train,
        captions_per_step=size.captions_per_step,
        questions_per_step=size.questions_per_step,
    )


def minutes(seconds: float) -> str:
    """Return a duration as text, e.g. `6.0 min`."""
    return f"{seconds / 60:.1f} min"


def table(forecast: Mapping[str, float], measured: Mapping[str, float], titles: Mapping[str, str]) -> list[list[str]]:
    """Return rows of stage, forecast and measured seconds, and their sum over the stages that have both.

    Args:
        forecast: seconds by stage; empty when nothing could be forecast.
        measured: seconds by stage, of those that are done.
        titles: what the stages are called, in order.
    """

    def cell(seconds: Mapping[str, float], name: str) -> str:
        return f"{seconds[name]:.0f} s" if name in seconds else "-"

    rows = [[title, cell(forecast, name), cell(measured, name)] for name, title in titles.items()]
    both = [name for name in titles if name in forecast and (name in measured or not measured)]
    sums = [minutes(sum(side[name] for name in both)) if both and side else "-" for side in (forecast, measured)]
    return [*rows, ["together", *sums]]


def as_text(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Return a table for the terminal."""
    return "\n".join(f"  {row[0]:<52}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in (header, *rows))
