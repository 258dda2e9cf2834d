"""Forecast of every stage from measured speed and amount of work, and the resulting plan of a run.

operations of a stage x (1 / (measured rate x reached share of it) + seconds beside matrix products) + constant seconds
settings --measure, forecast--> settings of a fitting size + Plan --plan.json--> terminal, page
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llava.errors import ConfigError, DataError
from llava.model.packaged import pretrained
from llava.quickstart import machine
from llava.quickstart.machine import Machine
from llava.quickstart.settings import AUTO, SIZED, QuickstartSettings, stored_settings
from llava.quickstart.work import LanguageShape, Rows, TowerShape, language_shape, rows_of, tower_shape
from llava.utils.jsonl import read_object, write_json

PLAN = "plan.json"

LORA_RANK = 16
NUM_CALIBRATION_IMAGES = 64
SPARE_TOKENS = 4
"""Number of tokens that an answer may exceed the longest reference answer by."""

LIMITS = (6 * 60.0, 11 * 60.0)
"""Limits of the forecast: the largest size below the first is used, else below the second, else the smallest size."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Speed of a kind of work relative to matrix products.

    Attributes:
        share: reached share of the measured rate.
        other: seconds of other work per 10^9 operations, on a CPU.
        float32: whether it computes in float32 also where bfloat16 is faster.
    """

    share: float
    other: float
    float32: bool = False


# Fits of training a projector, of training all else, and of answering, and constant seconds of each stage: fitted to
# whole runs on two cores, of 480 drawings in bf16 at 843 GFLOP/s, of 240 in bf16 at 353 and of 180 in float32 at 127.
# Products of a stage are larger than the measured ones, so a share may exceed 1. Nothing was fitted on a GPU, whose
# fixed costs are small compared with those of a CPU.
ALIGN, TUNE, ANSWER = Fit(0.74, 0.0031), Fit(1.31, 0.0060), Fit(1.5, 0.0030, float32=True)
DRAWING_SECONDS = 0.012
FIXED_SECONDS = {"parts": 7.0, "data": 0.5, "before": 6.0, "align": 5.0, "tune": 9.0, "after": 6.0, "page": 1.0}

FORWARD, BACKWARD = 2, 2
"""Operations per weight and token; gradients of trained weights count as a second backward pass."""


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a run: the number of training drawings; every size takes the same number of steps."""

    name: str
    num_train: int
    captions_per_step: int
    questions_per_step: int


SIZES = (
    Size("full", 480, 8, 48),
    Size("medium", 360, 6, 36),
    Size("small", 240, 4, 24),
)
"""Sizes from large to small. The number of test drawings is the same, because the intervals need them; 180 drawings to
train on do not show that the images are used."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Operations of the stages with a language model and a vision tower."""

    language: LanguageShape
    tower: TowerShape

    def seen(self, images: float) -> float:
        """Return the operations of the tower on images."""
        return FORWARD * self.tower.weights * (self.tower.tokens + 1) * images

    def prompts(self, images: float, text_tokens: float) -> float:
        """Return the operations of prefilling questions, those about one image together."""
        return FORWARD * self.language.blocks * (images * self.tower.tokens + text_tokens)

    def decoded(self, tokens: float) -> float:
        """Return the operations of decoding answers."""
        return FORWARD * (self.language.blocks + self.language.head) * tokens

    def trained(self, images: float, text_tokens: float, targets: float, adapters: int = 0) -> float:
        """Return the operations of training on rows, those about one image together.

        Args:
            images: number of images in the language model's rows.
            text_tokens: text tokens of all rows.
            targets: number of predicted tokens.
            adapters: number of LoRA weights.
        """
        body = (FORWARD + BACKWARD) * self.language.blocks + (FORWARD + 2 * BACKWARD) * adapters
        head = (FORWARD + BACKWARD) * self.language.head
        return body * (images * self.tower.tokens + text_tokens) + head * targets


def fitted_seconds(operations: float, machine: Machine, fit: Fit) -> float:
    """Return the seconds of operations of matrix products, and of the work that comes with them."""
    rate = 1e9 * machine.float32 if fit.float32 else machine.rate
    other = 0.0 if machine.device == "cuda" else fit.other
    return operations / (rate * fit.share) + operations * other / 1e9


def stage_seconds(
    settings: QuickstartSettings, machine: Machine, language: LanguageShape, tower: TowerShape, rows: Rows
) -> dict[str, float]:
    """Return the seconds forecast for each stage.

    Args:
        settings: settings of the run.
        machine: measured speed.
        language: sizes of the language model.
        tower: sizes of the vision tower.
        rows: amount of data of the run.
    """
    costs = Costs(language, tower)

    asked = min(settings.num_before, rows.test_questions)
    images_asked, tokens_asked = min(rows.test_images, asked), rows.test_tokens * asked / max(1.0, rows.test_questions)
    before = costs.seen(NUM_CALIBRATION_IMAGES + images_asked) + costs.prompts(images_asked, tokens_asked)
    before += costs.decoded(asked * (rows.longest_answer + SPARE_TOKENS))
    # In the blank-image control all questions share one gray image.
    prompts_after = costs.prompts(rows.test_images, rows.test_tokens) + costs.prompts(1, rows.test_tokens)
    after = costs.seen(rows.test_images) + prompts_after + 2 * costs.decoded(rows.test_answer_tokens)
    captions = costs.trained(rows.captions, rows.caption_tokens, rows.caption_tokens) + costs.seen(rows.train_images)
    images_tuned, adapters = rows.train_images * settings.epochs, language.lora(LORA_RANK)
    tuned = costs.trained(images_tuned, rows.question_tokens, rows.answer_tokens, adapters)
    scaling = {
        "data": rows.drawings * DRAWING_SECONDS,
        "before": fitted_seconds(before, machine, ANSWER),
        "align": fitted_seconds(captions, machine, ALIGN),
        "tune": fitted_seconds(tuned, machine, TUNE),
        "after": fitted_seconds(after, machine, ANSWER),
    }
    return {name: fixed + scaling.get(name, 0.0) for name, fixed in FIXED_SECONDS.items()}


def choose_size(
    settings: QuickstartSettings, machine: Machine, language: LanguageShape, tower: TowerShape
) -> tuple[QuickstartSettings, str]:
    """Return the settings with the largest size that fits, and the reason as a sentence.

    A number or data set that the user has given is never changed.
    """
    if settings.size != AUTO:
        what = "the rows of --data" if settings.data is not None else f"--num-train {settings.num_train}"
        return settings, f"Size as given: {what}."
    forecasts = [
        sum(stage_seconds(sized, machine, language, tower, rows_of(sized)).values())
        for sized in (with_size(settings, size) for size in SIZES)
    ]
    tried = [
        f"{size.name} ({size.num_train} drawings) {minutes(total)}"
        for size, total in zip(SIZES, forecasts, strict=True)
    ]
    fitting = [
        (size, limit) for limit in LIMITS for size, total in zip(SIZES, forecasts, strict=True) if total <= limit
    ]
    size, limit = fitting[0] if fitting else (SIZES[-1], LIMITS[-1])
    fits = "it fits into" if fitting else "the smallest; none fits into"
    reason = f"Size {size.name}, {size.num_train} drawings to train on: {fits} {minutes(limit)}"
    return with_size(settings, size), f"{reason} (forecast: {', '.join(tried)})."


def with_size(settings: QuickstartSettings, size: Size) -> QuickstartSettings:
    """Return the settings with the numbers of a size."""
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


def time_table(
    forecast: Mapping[str, float], measured: Mapping[str, float], titles: Mapping[str, str]
) -> list[list[str]]:
    """Return rows of stage, forecast and measured seconds, with their sums over the stages that have both.

    Args:
        forecast: seconds by stage; empty without a forecast.
        measured: seconds by stage that is done.
        titles: titles of the stages, in order.
    """

    def cell(seconds: Mapping[str, float], name: str) -> str:
        return f"{seconds[name]:.0f} s" if name in seconds else "-"

    rows = [[title, cell(forecast, name), cell(measured, name)] for name, title in titles.items()]
    both = [name for name in titles if name in forecast and (name in measured or not measured)]
    sums = [minutes(sum(side[name] for name in both)) if both and side else "-" for side in (forecast, measured)]
    return [*rows, ["together", *sums]]


def text_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Return a table as text for the terminal."""
    return "\n".join(f"  {row[0]:<52}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in (header, *rows))


@dataclass(frozen=True, slots=True)
class Plan:
    """Machine, size and forecast of a run before the first stage.

    Attributes:
        machine: measured speed as text.
        reason: chosen size and the reason for it.
        seconds: forecast by stage; empty without a forecast.
    """

    machine: str
    reason: str
    seconds: dict[str, float]

    def write(self, out: Path) -> None:
        """Write the plan to the run's folder."""
        write_json(out / PLAN, asdict(self))


def read_plan(out: Path) -> Plan:
    """Return the plan of a run's folder.

    Raises:
        ConfigError: the file is not a plan.
    """
    try:
        return Plan(**read_object(out / PLAN))
    except (TypeError, DataError) as error:
        raise ConfigError(
            f"{out / PLAN} is not the plan of a quickstart run ({error}); name another folder with --out"
        ) from error


def new_plan(settings: QuickstartSettings) -> tuple[QuickstartSettings, Plan]:
    """Measure the machine; return the settings with a fitting size, and the plan."""
    language, tower = language_shape(settings.lm), tower_shape(settings.vision_tower, settings.image_size)
    shape = language or LanguageShape()
    measured = machine.measure_machine(shape.linear_layers, shape.config)
    if language is None or tower is None:
        part = f"--lm {settings.lm}" if language is None else f"--vision-tower {settings.vision_tower}"
        sized = settings if settings.size != AUTO else with_size(settings, SIZES[-1])
        reason = f"Size {sized.size}. No forecast: the configuration of {part} cannot be read before it is loaded."
        return sized, Plan(str(measured), reason, {})
    sized, reason = choose_size(settings, measured, language, tower)
    seconds = stage_seconds(sized, measured, language, tower, rows_of(sized))
    if (settings.lm and settings.vision_tower) or pretrained.is_converted(settings.image_size):
        seconds["parts"] = 0.0
    return sized, Plan(str(measured), reason, seconds)


def planned(settings: QuickstartSettings, *, restart: bool) -> tuple[QuickstartSettings, Plan]:
    """Return the settings and the plan of this run: those of the run in the folder, or new ones.

    A run in the folder keeps its size on any machine, also if its number of drawings is given.
    """
    before = None if restart else stored_settings(settings.out)
    if before is None:
        return new_plan(settings)
    if settings.size == AUTO or settings.num_train == before["num_train"]:
        settings = replace(settings, **{name: before[name] for name in SIZED if name in before})
    if not (settings.out / PLAN).is_file():
        return new_plan(settings)
    return settings, read_plan(settings.out)
