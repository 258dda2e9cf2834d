"""HTML report of a check, with thumbnails of the images to review.

The page loads no external resources and shows no text of the rows. It does show images and file names, so it must be
protected like the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path

from llava.data.check.report import CheckReport, image_data, person_line, token_line
from llava.data.check.rules import RULES, CheckFinding
from llava.imaging import decode
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import page, table, thumbnail

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


def write_page(path: Path, report: CheckReport, *, strict: bool) -> None:
    """Write the HTML report of a check."""
    file = report.scans[0].path.name
    parts = [f"<h1>Check of {escape(file)}</h1>", f"<p>{escape(_verdict(report, strict))}</p>", _files(report)]
    if len(report.scans) > 1:
        parts.append(f"<p>{escape(person_line(report))}</p>")
    if report.findings.rules():
        parts += ["<h2>Findings</h2>", _rules(report)]
    for rule, number in report.findings.rules():
        parts += _rule(report, rule, number)
    parts += _images(report)
    if report.tokens is not None:
        parts += [f"<h2>Tokens with {escape(report.tokens.model)}</h2>", f"<p>{escape(token_line(report.tokens))}</p>"]
    for name, counts in report.scans[0].balance.tables().items():
        parts += [f"<h2>Rows by {escape(name)}</h2>", _counts(name, counts)]
    write_atomic(path, page(f"Check of {file}", parts))


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


def _files(report: CheckReport) -> str:
    rows = [
        [scan.path.name, str(scan.index.num_rows), str(scan.num_readable), str(sum(scan.repairs.values()))]
        for scan in report.scans
    ]
    return table(["file", "rows", "readable", "read leniently"], rows)


def _rules(report: CheckReport) -> str:
    rows = []
    for rule, file in report.findings.rules():
        found, about = report.findings.of(rule, file), RULES[rule]
        where = NAMES[file]
        rows.append([about.title, about.level, where, str(found.count), str(report.num_rows_of(rule, file))])
    return table(["finding", "level", "in", "findings", "rows"], rows)


def _rule(report: CheckReport, rule: str, file: int) -> list[str]:
    """Return the section of one rule: hint, images of the first findings, and a list of findings."""
    found, about = report.findings.of(rule, file), RULES[rule]
    verdict = "wrong" if about.level == "error" else "note"
    parts = [
        f'<h2>{escape(about.title)} <span class="{verdict}">{about.level}, {NAMES[file]}</span></h2>',
        f'<p class="note">{escape(about.hint)}</p>',
    ]
    if rule in ILLUSTRATED:
        parts += [_case(report, finding) for finding in found.listed[:MAX_CASES]]
    listed = found.listed[:MAX_LISTED]
    if all(finding.message == about.title and not finding.other_rows for finding in listed):
        rows = [row for finding in listed for row in finding.rows]
        parts.append(f"<p>rows {_numbers(rows)}</p>")
    else:
        cells = [[finding.message, _numbers(finding.rows), _numbers(finding.other_rows)] for finding in listed]
        parts.append(table(["finding", "rows", "rows of the other file"], cells))
    if found.count > len(listed):
        parts.append(f'<p class="note">and {found.count - len(listed)} more; the JSON report has all row numbers</p>')
    return parts


def _numbers(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows))


def _case(report: CheckReport, finding: CheckFinding) -> str:
    """Return the images of one finding with their names."""
    scan, places = report.image_scan, finding.images[:MAX_SHOWN]
    shown = [
        thumbnail(scan.name(place), partial(decode.load, root=scan.root(place)))  # has a root, as it was opened
        for place in places
    ]
    names = ", ".join(map(scan.name, places))
    words = f"<dl><dt>images</dt><dd>{escape(names)}</dd><dt>finding</dt><dd>{escape(finding.message)}</dd></dl>"
    return f'<div class="case">{"".join(shown)}{words}</div>'


def _images(report: CheckReport) -> list[str]:
    data = image_data(report.image_scan)
    if not data["opened"]:
        return ['<p class="note">The images were not opened.</p>']
    sides = [[name, *(str(side[key]) for key in side)] for name, side in data["sides"].items()]
    return [
        "<h2>Images</h2>",
        f"<p>{data['named']} named by the rows, {data['decoded']} decoded, {data['num_sizes']} distinct sizes</p>",
        _counts("stored as", data["forms"]),
        table(["side", "smallest", "median", "largest"], sides),
        _counts("most frequent sizes", data["sizes"], total=data["decoded"]),
    ]


def _counts(name: str, counts: Mapping[str, int], *, total: int = 0) -> str:
    """Return a table of counts with their percentage of `total` (0: of their sum)."""
    total = total or sum(counts.values()) or 1
    rows = [[word, str(number), f"{100 * number / total:.1f} %"] for word, number in list(counts.items())[:MAX_CLASSES]]
    if len(counts) > MAX_CLASSES:
        rows.append([f"{len(counts) - MAX_CLASSES} more", "", ""])
    return table([name, "number", "share"], rows)
