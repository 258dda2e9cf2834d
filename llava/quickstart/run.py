"""Command `llava quickstart`: run the stages that are not done yet and report the results.

    settings, plan --(stored in the folder)--> stage --done-marker--> stage --done-marker--> ... --> page

A marker is written when its stage has ended, so an interrupted run resumes with the next stage.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from llava.errors import ConfigError
from llava.quickstart import forecast, machine
from llava.quickstart.forecast import SETTINGS, Plan, text_table, time_table
from llava.quickstart.settings import QuickstartSettings, parse_settings
from llava.quickstart.stages import STAGES, Context, Facts
from llava.utils import log
from llava.utils.jsonl import read_text, write_json

MARKERS = "stages"

Stages = Mapping[str, tuple[str, Callable[[Context], Facts]]]


def claim_folder(settings: QuickstartSettings, *, restart: bool) -> None:
    """Create the run's folder, or check that it holds the same run.

    Raises:
        ConfigError: the folder holds other files or a run with other settings; it stays unchanged.
    """
    path = settings.out / SETTINGS
    ours = path.is_file()
    if settings.out.exists() and not ours and any(settings.out.iterdir()):
        raise ConfigError(f"{settings.out} holds files that are not a quickstart run; name a new folder with --out")
    if ours and restart:
        shutil.rmtree(settings.out)
        ours = False
    wanted = settings.to_json()
    if ours:
        before = json.loads(read_text(path))
        different = sorted(name for name in wanted.keys() | before.keys() if wanted.get(name) != before.get(name))
        if different:
            raise ConfigError(
                f"{settings.out} holds a run with other {', '.join(different)}; name another --out, or delete that run "
                f"with --restart"
            )
    settings.out.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def run_stages(settings: QuickstartSettings, *, stages: Stages = STAGES, out: TextIO | None = None) -> Context:
    """Run every stage without a marker, in order; return the facts of all stages."""
    out = out or sys.stdout
    context = Context(settings)
    for number, (name, (title, function)) in enumerate(stages.items(), 1):
        marker = settings.out / MARKERS / f"{name}.json"
        heading = f"[{number}/{len(stages)}] {title}"
        if marker.is_file():
            context.facts[name] = json.loads(read_text(marker))
            out.write(f"{heading}: done before\n")
            continue
        out.write(f"{heading}\n")
        out.flush()
        start = time.monotonic()
        facts = function(context)
        context.facts[name] = {**facts, "seconds": round(time.monotonic() - start, 1)}
        marker.parent.mkdir(exist_ok=True)
        write_json(marker, context.facts[name])
        out.write(f"      {context.facts[name]['seconds']:.0f} s\n")
    return context


def opening(outlook: Plan) -> str:
    """Return the text for the terminal at the start: machine, size and forecast."""
    titles = {name: title for name, (title, _) in STAGES.items()}
    rows = [row[:2] for row in time_table(outlook.seconds, {}, titles)]
    stages = text_table(rows, ["", "forecast"]) + "\n\n" if outlook.seconds else ""
    return f"Machine: {outlook.machine}\n{outlook.reason}\n{stages}"


def conclusion(context: Context, outlook: Plan) -> str:
    """Return the text for the terminal at the end: results, page, chat command and times."""
    titles = {name: title for name, (title, _) in STAGES.items()}
    times = text_table(time_table(outlook.seconds, context.seconds, titles), ["", "forecast", "measured"])
    final: Facts = context.facts["page"]
    return (
        f"\n{context.notice}\n{final['summary']}\n\npage: {context.path('index.html')}\nchat: {final['chat']}\n"
        f"\n{times}\n{outlook.reason}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava quickstart`."""
    settings, restart = parse_settings(argv)
    log.setup_logging()
    machine.use_physical_cores()
    settings, outlook = forecast.planned(settings, restart=restart)
    claim_folder(settings, restart=restart)
    outlook.write(settings.out)
    sys.stdout.write(opening(outlook))
    sys.stdout.write(conclusion(run_stages(settings), outlook))
