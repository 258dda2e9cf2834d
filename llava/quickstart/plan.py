"""Plan of a run: measured machine, fitting size and forecast, stored in the run's folder.

settings --measure, forecast--> settings of a fitting size + Plan --plan.json--> terminal, page
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llava.quickstart import machine, pretrained
from llava.quickstart.forecast import SIZES, choose_size, stage_seconds, with_size
from llava.quickstart.settings import AUTO, SIZED, QuickstartSettings
from llava.quickstart.work import LanguageShape, language_shape, rows_of, tower_shape
from llava.utils.jsonl import read_text, write_json

SETTINGS, PLAN = "settings.json", "plan.json"


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
    """Return the plan of a run's folder."""
    return Plan(**json.loads(read_text(out / PLAN)))


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


def resumed_plan(settings: QuickstartSettings) -> tuple[QuickstartSettings, Plan] | None:
    """Return the settings and the plan of the run in the folder; None without a run.

    The run keeps its size on any machine.
    """
    if not all((settings.out / name).is_file() for name in (SETTINGS, PLAN)):
        return None
    before = json.loads(read_text(settings.out / SETTINGS))
    if settings.size == AUTO:
        settings = replace(settings, **{name: before[name] for name in SIZED if name in before})
    return settings, read_plan(settings.out)


def planned(settings: QuickstartSettings, *, restart: bool) -> tuple[QuickstartSettings, Plan]:
    """Return the settings and the plan of this run: those of the run in the folder, or new ones."""
    return (None if restart else resumed_plan(settings)) or new_plan(settings)
