"""The result of a check as one HTML page, with small copies of the pictures that a person should look at.

The page loads nothing from elsewhere and shows no text of the rows, but it does show pictures and file names: it
belongs where the data may be.
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
"""Findings of one rule on the page."""

MAX_CASES = 12
"""Findings of one rule that are shown with their pictures."""

MAX_SHOWN = 4
"""Pictures of one finding."""

MAX_CLASSES = 15

ILLUSTRATED = ("leak-bytes", "leak-pixels", "near-duplicate", "same-picture")
"""Rules whose findings are shown with their pictures."""

NAMES = ("the file", "the other file")


def write_page(path: Path, report: CheckReport, *, strict: bool) -> None:
    """Write the page."""
    file = report.scans[0].path.name
    parts = [f"<h1>Check of {escape(file)}</h1>", f"<p>{escape(_verdict(report, strict))}</p>", _files(report)]
    if len(report.scans) > 1:
        parts.append(f"<p>{escape(person_line(report))}</p>")
    if report.findings.rules():
        parts += ["<h2>What was found</h2>", _rules(report)]
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
    left = f" {report.num_uncompared} pairs of look-alikes were not compared." if report.num_uncompared else ""
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
    """Return the section of one rule: its hint, its first findings, and pictures where they tell something."""
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
        parts.append(table(["what", "rows", "rows of the other file"], cells))
    if found.count > len(listed):
        parts.append(f'<p class="note">and {found.count - len(listed)} more; the JSON report has every row number</p>')
    return parts


def _numbers(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows))


def _case(report: CheckReport, finding: CheckFinding) -> str:
    """Return the pictures of one finding with their names."""
    scan, places = report.image_scan, finding.images[:MAX_SHOWN]
    shown = [
        thumbnail(scan.name(place), partial(decode.load, root=scan.root(place)))  # opened before, so it has one
        for place in places
    ]
    names = ", ".join(map(scan.name, places))
    words = f"<dl><dt>pictures</dt><dd>{escape(names)}</dd><dt>what</dt><dd>{escape(finding.message)}</dd></dl>"
    return f'<div class="case">{"".join(shown)}{words}</div>'


def _images(report: CheckReport) -> list[str]:
    data = image_data(report.image_scan)
    if not data["opened"]:
        return ['<p class="note">The pictures were not opened.</p>']
    sides = [[name, *(str(side[key]) for key in side)] for name, side in data["sides"].items()]
    return [
        "<h2>Pictures</h2>",
        f"<p>{data['named']} named by the rows, {data['decoded']} decoded, {data['num_sizes']} different sizes</p>",
        _counts("stored as", data["forms"]),
        table(["side", "smallest", "median", "largest"], sides),
        _counts("most frequent sizes", data["sizes"], total=data["decoded"]),
    ]


def _counts(name: str, counts: Mapping[str, int], *, total: int = 0) -> str:
    """Return a table of counts with their shares of `total` (0: of their sum)."""
    total = total or sum(counts.values()) or 1
    rows = [[word, str(number), f"{100 * number / total:.1f} %"] for word, number in list(counts.items())[:MAX_CLASSES]]
    if len(counts) > MAX_CLASSES:
        rows.append([f"{len(counts) - MAX_CLASSES} more", "", ""])
    return table([name, "number", "share"], rows)
