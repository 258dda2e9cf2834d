"""`llava rules rollouts`: the best, worst and contradictory dialogues of a run, step by step.

The page makes no requests. It contains answers and images, so the rules of the data apply to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava.constants import ARGUMENTS_FILE
from llava.errors import DataError
from llava.imaging.decode import load_image
from llava.train.rollout.files import ROLLOUTS_FILE, read_rollouts
from llava.utils.cli import Parser, check_folder
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import read_object, write_atomic
from llava.utils.reporting import OpenImage, html_thumbnail, render_page, text_table
from llava.utils.terminal import write_out

MAX_STEPS = 14
"""Maximum number of steps on a page, as many as its style can select; of more, equally distant ones are shown."""

EACH = 2
"""Best and worst dialogues of a step, and twice as many contradictory ones."""


def make_parser() -> Parser:
    """Return the parser of `llava rules rollouts`."""
    parser = Parser(prog="llava rules rollouts", description="Show what a run of reinforcement learning sampled.")
    parser.add_argument("run", type=Path, help="output folder of the run")
    parser.add_argument(
        "--html", nargs="?", const="", metavar="FILE", help="write a page; default of FILE: rollouts.html in the run"
    )
    parser.add_argument("--image-folder", help="folder of the images; default: that of the run")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of a run's rollouts, or write the page."""
    args = make_parser().parse_args(argv)
    check_folder(args.image_folder, "--image-folder")
    episodes = read_rollouts(args.run)
    if not episodes:
        raise DataError(f"{args.run / ROLLOUTS_FILE}: no rollout yet; the file is written by `llava train --rules`")
    if args.html is None:
        write_out(text_table(HEADERS, [_numbers(step, rows) for step, rows in by_step(episodes).items()]) + "\n")
        return
    path = Path(args.html) if args.html else args.run / "rollouts.html"
    refuse_overwriting([args.run / ROLLOUTS_FILE, args.run / ARGUMENTS_FILE], {"--html": path})
    write_page(path, episodes, image_folder=args.image_folder or _image_folder(args.run))
    write_out(f"{path}: {len(by_step(episodes))} steps, {len(episodes)} dialogues\n")


HEADERS = ("step", "dialogues", "reward", "all right", "contradictory", "not learned from")


def by_step(episodes: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Return the episodes of each step."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for episode in episodes:
        found.setdefault(int(episode["step"]), []).append(episode)
    return found


def _numbers(step: int, rows: Sequence[Mapping[str, Any]]) -> list[float | int]:
    mean = sum(row["total"] for row in rows) / len(rows)
    right = sum(
        all(row["truth"][node] == v for node, v in zip(row["asked"], row["values"], strict=True)) for row in rows
    )
    contradictory, dropped = (sum(bool(row[name]) for row in rows) for name in ("violations", "dropped"))
    return [step, len(rows), round(mean, 4), right, contradictory, dropped]


def _image_folder(run: Path) -> str | None:
    path = run / ARGUMENTS_FILE
    found = read_object(path).get("data") if path.is_file() else None
    return found.get("image_folder") if isinstance(found, dict) else None


def write_page(path: Path, episodes: Sequence[Mapping[str, Any]], *, image_folder: str | None) -> None:
    """Write the page of the episodes of a run.

    Args:
        path: the page.
        episodes: rows of `rollouts.jsonl`.
        image_folder: folder that image names are relative to.
    """

    def open_image(name: str) -> Image.Image:
        return load_image(name, image_folder)

    steps = list(by_step(episodes).items())
    num = min(len(steps), MAX_STEPS)
    shown = [steps[round(place * (len(steps) - 1) / max(1, num - 1))] for place in range(num)]
    text = render_page(
        "rollouts.html",
        title="Rollouts",
        headers=HEADERS,
        numbers=[_numbers(step, rows) for step, rows in steps],
        steps=[{"title": f"step {step}", "cases": _cases(rows, open_image)} for step, rows in shown],
    )
    write_atomic(path, text)


def _cases(rows: Sequence[Mapping[str, Any]], opener: OpenImage) -> list[dict[str, Any]]:
    """Return the best, the worst and contradictory dialogues of a step."""
    ordered = sorted(rows, key=lambda row: (-row["total"], row["group"], row["sample"]))
    broken = [row for row in ordered if row["violations"]]
    parts = {"best": ordered[:EACH], "worst": ordered[-EACH:][::-1], "contradictory": broken[: 2 * EACH]}
    return [_case(row, kind, opener) for kind, members in parts.items() for row in members]


def _case(row: Mapping[str, Any], kind: str, opener: OpenImage) -> dict[str, Any]:
    turns = zip(row["asked"], row["answers"], row["values"], row["finishes"], row["turns"], strict=True)
    return {
        "image": html_thumbnail(row["image"], opener),
        "facts": [
            ("shown as", kind),
            (
                "case",
                f"step {row['step']}, {row['case']}, {row['style']}, group {row['group']}, sample {row['sample']}",
            ),
            ("reward", f"{row['total']:.3f} (raw {row['raw']:.3f})" + (", not learned from" if row["dropped"] else "")),
            *([("breaks", ", ".join(row["violations"]))] if row["violations"] else []),
        ],
        "turns": [
            [node, row["truth"][node], value, answer + ("" if finish == "stop" else " (unfinished)"), f"{share:+.3f}"]
            for node, answer, value, finish, share in turns
        ],
    }
