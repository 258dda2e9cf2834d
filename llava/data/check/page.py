"""HTML report of a check, with thumbnails of the images to review.

The page loads no external resources and shows no text of the rows. It does show images and their names, without folders
unless asked, so it must be protected like the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path, PurePath
from typing import Any

from llava.data.check.report import CheckReport, image_data, person_line, token_line
from llava.data.check.row_index import as_array
from llava.data.check.rules import FILE, RULES, CheckFinding
from llava.imaging import decode
from llava.utils.histograms import histogram
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import html_thumbnail, render_page

MAX_LISTED = 100
"""Findings listed per rule."""

MAX_CASES = 12
"""Findings shown with images per rule."""

MAX_SHOWN = 4
"""Images shown per finding."""

MAX_CLASSES = 15
"""Lines of a table of counts."""

ILLUSTRATED = ("leak-bytes", "leak-pixels", "near-duplicate", "same-picture")
"""Rules whose findings are shown with images."""

NAMES = ("the file", "the other file")

TOKENS = "tokens per row"
COLUMNS = ("finding", "rows", "rows of the other file")


def write_page(path: Path, report: CheckReport, *, strict: bool, show_folders: bool = False) -> None:
    """Write the HTML report of a check.

    Args:
        path: the page.
        report: result of the check.
        strict: whether warnings are errors.
        show_folders: show names of images with their folders, which often name a patient.
    """
    shown = _NameView(report, show_folders)
    rules, tokens = report.findings.rules(), report.tokens
    text = render_page(
        "check.html",
        title=f"Check of {report.scans[0].path.name}",
        verdict=_verdict(report, strict),
        files=[
            [scan.path.name, scan.index.num_rows, scan.num_readable, sum(scan.repairs.values())]
            for scan in report.scans
        ],
        persons=person_line(report) if len(report.scans) > 1 else "",
        overview=[_overview(report, rule, file) for rule, file in rules],
        rules=[_rule(shown, rule, file) for rule, file in rules],
        plots=_plots(report),
        images=_images(report),
        tokens=None if tokens is None else {"model": tokens.model, "line": token_line(tokens)},
        classes=[(name, _shares(counts)) for name, counts in report.scans[0].balance.tables().items()],
    )
    write_atomic(path, text)


def _verdict(report: CheckReport, strict: bool) -> str:
    errors, warnings = report.findings.count("error"), report.findings.count("warning")
    status = report.exit_status(strict=strict)
    left = (
        f" {report.num_uncompared} candidate pairs of near-duplicates were not compared."
        if report.num_uncompared
        else ""
    )
    return (
        f"{errors} errors, {warnings} warnings; {report.num_not_trainable()} rows are not trainable; "
        f"exit status {status}.{left}"
    )


def _overview(report: CheckReport, rule: str, file: int) -> list[str | int]:
    found, about = report.findings.of(rule, file), RULES[rule]
    return [about.title, about.level, NAMES[file], found.count, report.num_rows_of(rule, file)]


@dataclass(frozen=True, slots=True)
class _NameView:
    """Names of images and messages of a report as the page shows them."""

    report: CheckReport
    folders: bool

    def name(self, place: int) -> str:
        name = self.report.image_scan.name(place)
        return name if self.folders else PurePath(name).name

    def message(self, finding: CheckFinding) -> str:
        text = finding.message
        if self.folders:
            return text
        scan, shown = self.report.image_scan, dict[str, str]()
        for place in finding.images:
            name, root = scan.name(place), scan.root(place)
            # Messages of the decoder hold the whole path, without needless parts such as `./`.
            folders = [] if root is None else [root, root.resolve()]
            paths = [str(Path(name)), *(str(folder / name) for folder in folders)]
            shown |= dict.fromkeys([name, *paths], PurePath(name).name)
            shown |= dict.fromkeys(map(str, folders), "--images")
        # The longest first: one may be the end or the beginning of another.
        for path in sorted(shown, key=len, reverse=True):
            text = text.replace(path, shown[path])
        return text


def _rule(view: _NameView, rule: str, file: int) -> dict[str, Any]:
    """Return the section of one rule: hint, images of the first findings, and a list of findings."""
    report = view.report
    found, about = report.findings.of(rule, file), RULES[rule]
    listed = found.listed[:MAX_LISTED]
    # Messages that only repeat the title, and files without a row, are left out.
    only_title = all(finding.message == about.title for finding in listed)
    has_others = any(finding.other_rows for finding in listed)
    only_rows = only_title and not has_others
    kept = [not only_title, True, has_others]
    return {
        "title": about.title,
        "level": about.level,
        "file": NAMES[file],
        "hint": about.hint,
        "cases": [_case(view, finding) for finding in found.listed[:MAX_CASES]] if rule in ILLUSTRATED else [],
        "rows": _numbers([row for finding in listed for row in finding.rows]) if only_rows else "",
        "headers": list(compress(COLUMNS, kept)),
        "findings": [
            list(compress((view.message(one), _numbers(one.rows), _numbers(one.other_rows)), kept)) for one in listed
        ],
        "num_more": found.count - len(listed),
    }


def _numbers(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows))


def _case(view: _NameView, finding: CheckFinding) -> dict[str, Any]:
    """Return the images of one finding with their names."""
    scan, places = view.report.image_scan, finding.images[:MAX_SHOWN]
    return {
        "images": [
            # Opened images have a root.
            html_thumbnail(scan.name(place), partial(decode.load_image, root=scan.root(place)))
            for place in places
        ],
        "names": ", ".join(map(view.name, places)),
        "message": view.message(finding),
    }


def _plots(report: CheckReport) -> dict[str, Any]:
    """Return the histograms, and in words what has the same value everywhere."""
    scan, tokens = report.scans[FILE], report.tokens
    plots: list[tuple[str, Mapping[int, int], str]] = [
        ("questions per row", scan.balance.turns, "rows"),
        ("images per row", scan.balance.images, "rows"),
        *((f"words per {name}", counts, f"{name}s") for name, counts in scan.texts.words.items()),
        *((f"image {name} in pixels", counts, "images") for name, counts in _sides(report)),
    ]
    if tokens is not None:
        plots.append((TOKENS, tokens.lengths, "rows"))
    shown = (
        histogram(name, counts, unit=unit, limit=tokens.limit if tokens and name == TOKENS else None)
        for name, counts, unit in plots
    )
    return {
        "shown": [plot for plot in shown if plot is not None],
        "constant": [f"{name} {value}" for name, counts, _ in plots if len(counts) == 1 for value in counts],
    }


def _sides(report: CheckReport) -> list[tuple[str, Counter[int]]]:
    """Return the number of images by width and by height; nothing if they were not opened."""
    scan = report.image_scan
    if not scan.opened:
        return []
    good = scan.good()
    sides = (("width", scan.widths), ("height", scan.heights))
    return [(name, Counter(as_array(values)[good].tolist())) for name, values in sides]


def _images(report: CheckReport) -> dict[str, Any]:
    data = image_data(report.image_scan)
    if not data["opened"]:
        return data
    return {
        **data,
        "forms": _shares(data["forms"]),
        "sides": [[name, *side.values()] for name, side in data["sides"].items()],
        "sizes": _shares(data["sizes"], total=data["decoded"]),
    }


def _shares(counts: Mapping[str, int], *, total: int = 0) -> list[list[str]]:
    """Return rows of counts with their percentage of `total` (0: of their sum)."""
    total = total or sum(counts.values()) or 1
    rows = [[word, str(number), f"{100 * number / total:.1f} %"] for word, number in list(counts.items())[:MAX_CLASSES]]
    if len(counts) > MAX_CLASSES:
        rows.append([f"{len(counts) - MAX_CLASSES} more", "", ""])
    return rows
