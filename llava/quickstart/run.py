"""Stages of the quickstart that are not done yet, and the report of the results.

    settings, plan --(stored in the folder)--> stage --done-marker--> stage --done-marker--> ... --> page

A marker is written when its stage has ended, so an interrupted run resumes with the next stage.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from llava.errors import ConfigError
from llava.quickstart import forecast, machine
from llava.quickstart.forecast import Plan, text_table, time_table
from llava.quickstart.settings import SETTINGS, QuickstartSettings, stored_settings
from llava.quickstart.stages import STAGES, Context, Facts
from llava.utils.files import CLAIM_FILE, exclusive_folder
from llava.utils.jsonl import read_object, write_json
from llava.utils.terminal import write_out

MARKERS = "stages"

Stages = Mapping[str, tuple[str, Callable[[Context], Facts]]]


def claim_folder(settings: QuickstartSettings, *, restart: bool) -> None:
    """Create the run's folder, or check that it holds the same run.

    Raises:
        ConfigError: the folder holds other files or a run with other settings; it stays unchanged.
    """
    before = stored_settings(settings.out)
    present = settings.out.iterdir() if settings.out.exists() else ()
    others = [file for file in present if file.name not in (CLAIM_FILE, f".{SETTINGS}.tmp")]
    if others and before is None:
        raise ConfigError(f"{settings.out} holds files that are not a quickstart run; name a new folder with --out")
    if before is not None and restart:
        for file in others:
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        before = None
    wanted = settings.to_json()
    if before is not None:
        different = sorted(name for name in wanted.keys() | before.keys() if wanted.get(name) != before.get(name))
        if different:
            raise ConfigError(
                f"{settings.out} holds a run with other {', '.join(different)}; name another --out, or delete that run "
                f"with --restart"
            )
    settings.out.mkdir(parents=True, exist_ok=True)
    write_json(settings.out / SETTINGS, wanted)


def run_stages(settings: QuickstartSettings, *, stages: Stages = STAGES, out: TextIO | None = None) -> Context:
    """Run every stage without a marker, in order; return the facts of all stages."""
    out = out or sys.stdout
    context = Context(settings)
    for number, (name, (title, function)) in enumerate(stages.items(), 1):
        marker = settings.out / MARKERS / f"{name}.json"
        heading = f"[{number}/{len(stages)}] {title}"
        if marker.is_file():
            context.facts[name] = read_object(marker)
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


def run_quickstart(settings: QuickstartSettings, *, restart: bool) -> None:
    """Run a quickstart, or what is left of it, and print forecast, facts and next commands.

    Raises:
        ConfigError: the folder of the run holds other files, or is in use.
    """
    machine.use_physical_cores()
    with exclusive_folder(settings.out, option="--out"):
        settings, outlook = forecast.planned(settings, restart=restart)
        claim_folder(settings, restart=restart)
        outlook.write(settings.out)
        write_out(opening(outlook))
        write_out(conclusion(run_stages(settings), outlook))
