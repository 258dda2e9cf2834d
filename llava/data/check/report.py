"""Check of a data file, alone or against another one, and its result as text and JSON data.

FILE, AGAINST --scan_file--> rows --ImageScan--> images --> repeats, near-duplicates, leaks --CheckReport--> JSON
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.check.images import ImageScan
from llava.data.check.near_duplicates import find_near_duplicates
from llava.data.check.overlap import find_leaks, find_repeated_rows, find_same_images, num_persons
from llava.data.check.pairs import label_lines, pair_lines
from llava.data.check.row_index import NameStore, RowIndex, as_array
from llava.data.check.rules import AGAINST, FILE, NOT_TRAINABLE, RULES, CheckFinding, CheckFindings, RuleFindings
from llava.data.check.scan import FileScan, scan_file
from llava.data.check.tokens import TokenBudget
from llava.data.groups import GROUP_FIELDS
from llava.utils.cli import check_folder
from llava.utils.terminal import visible


@dataclass(slots=True)
class CheckReport:
    """Result of a check.

    Attributes:
        scans: scan of each file, the checked file first.
        image_scan: images of all files.
        findings: all findings.
        num_uncompared: candidate pairs of near-duplicates beyond the limit, which were not compared.
        tokens: token counts with the tokenizer of a model, if one was given.
    """

    scans: list[FileScan]
    image_scan: ImageScan
    findings: CheckFindings
    num_uncompared: int = 0
    tokens: TokenBudget | None = None

    def exit_status(self, *, strict: bool) -> int:
        """Return 1 for errors, with `strict` also for warnings; else 0."""
        return int(self.findings.count("error") > 0 or (strict and self.findings.count("warning") > 0))

    def num_not_trainable(self) -> int:
        """Return the number of rows, over all files, that contain nothing to train on."""
        files = range(len(self.scans))
        return sum(self.findings.of(rule, file).count for rule in NOT_TRAINABLE for file in files)

    def num_persons(self) -> dict[str, list[int]]:
        """Return the number of distinct patients or studies in each file, by field."""
        return num_persons([scan.index for scan in self.scans])

    def num_rows_of(self, rule: str, file: int) -> int:
        """Return the number of distinct rows of a file that violate a rule."""
        return len(np.unique(as_array(self.findings.of(rule, file).rows)))


def check_file(
    path: Path,
    *,
    images: Path | None = None,
    against: Path | None = None,
    against_images: Path | None = None,
    group_fields: Sequence[str] = GROUP_FIELDS,
    max_listed: int = 1000,
    num_threads: int | None = None,
) -> CheckReport:
    """Check a data file, alone or against another one.

    Args:
        path: the file.
        images: image folder; None leaves the images unopened.
        against: file that must not share anything with it, for example the test set.
        against_images: image folder of that file; None means the same folder.
        group_fields: fields with patient or study ids.
        max_listed: maximum number of messages per rule.
        num_threads: threads that open images; None means one per CPU.

    Raises:
        DataError: a file does not exist.
        ConfigError: a folder does not exist.
    """
    roots = [images] if against is None else [images, against_images or images]
    check_folder(images, "--images")
    check_folder(against_images, "--against-images")
    findings, names = CheckFindings(max_listed), NameStore()
    scans = []
    for file, part in enumerate([path] if against is None else [path, against]):
        root_number = int(file == AGAINST and _differ(roots[FILE], roots[AGAINST]))
        opens = images is not None
        index = RowIndex(group_fields, names, root=root_number, compares=against is not None, opens=opens)
        scans.append(scan_file(part, index, file, findings))
        find_repeated_rows(index, file, findings)
    image_scan = ImageScan([scan.index for scan in scans], names, roots)
    report = CheckReport(scans, image_scan, findings)
    if images is not None:
        image_scan.open_all(num_threads=num_threads)
        _report_bad(image_scan, findings)
        for file in range(len(scans)):
            find_same_images(image_scan, file, findings)
        report.num_uncompared = find_near_duplicates(image_scan, findings)
    if against is not None:
        find_leaks([scan.index for scan in scans], image_scan, findings)
    return report


def _differ(first: Path | None, second: Path | None) -> bool:
    return first is not None and second is not None and first.resolve() != second.resolve()


def _report_bad(image_scan: ImageScan, findings: CheckFindings) -> None:
    """Report missing and broken images, once per file that names them."""
    for place, rule, message in image_scan.bad():
        for file in range(len(image_scan.of_ref)):
            rows = image_scan.rows(file, np.asarray([place]))
            if rows:
                findings.add(rule, file, rows, message, images=[place])


def report_data(report: CheckReport, *, strict: bool) -> dict[str, Any]:
    """Return the report as JSON data: counts and, per rule, all row numbers and the first messages."""
    names = ("file", "against")
    return {
        "exit_status": report.exit_status(strict=strict),
        "strict": strict,
        "errors": report.findings.count("error"),
        "warnings": report.findings.count("warning"),
        "not_trainable": report.num_not_trainable(),
        "files": {names[file]: _file_data(scan) for file, scan in enumerate(report.scans)},
        "persons": report.num_persons(),
        "pictures": image_data(report.image_scan),
        "pairs_not_compared": report.num_uncompared,
        "tokens": None if report.tokens is None else _token_data(report.tokens),
        "rules": [_rule_data(report, rule, file, names[file]) for rule, file in report.findings.rules()],
    }


def _token_data(tokens: TokenBudget) -> dict[str, Any]:
    """Return the figures without the counts of all lengths, which only the page shows."""
    return {name: value for name, value in asdict(tokens).items() if name != "lengths"}


def _file_data(scan: FileScan) -> dict[str, Any]:
    return {
        "name": scan.path.name,
        "rows": scan.index.num_rows,
        "readable": scan.num_readable,
        "question_rows": scan.num_questions,
        "read_leniently": dict(scan.repairs.most_common()),
        "questions_per_row": {str(number): count for number, count in sorted(scan.balance.turns.items())},
        "images_per_row": {str(number): count for number, count in sorted(scan.balance.images.items())},
        "words": scan.texts.table(),
        "classes": scan.balance.tables(),
        "preferences": scan.lengths.table(),
        "labels": scan.labels.table(),
    }


def image_data(image_scan: ImageScan) -> dict[str, Any]:
    """Return JSON data with sizes and stored forms of the images that decoded."""
    if not image_scan.opened:
        return {"named": len(image_scan), "opened": False}
    good = image_scan.good()
    widths, heights = as_array(image_scan.widths)[good], as_array(image_scan.heights)[good]
    sizes, counts = np.unique(np.stack([widths, heights], axis=1), axis=0, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:20]
    sides = {}
    for name, values in (("width", widths), ("height", heights)):
        if len(values):
            low, middle, high = np.quantile(values, [0.0, 0.5, 1.0], method="nearest")
            sides[name] = {"smallest": int(low), "median": int(middle), "largest": int(high)}
    return {
        "named": len(image_scan),
        "opened": True,
        "decoded": int(good.sum()),
        "forms": image_scan.kind_table(),
        "sides": sides,
        "num_sizes": len(counts),
        "sizes": {f"{sizes[place][0]} x {sizes[place][1]}": int(counts[place]) for place in most},
    }


def _rule_data(report: CheckReport, rule: str, file: int, file_name: str) -> dict[str, Any]:
    found = report.findings.of(rule, file)
    rows = np.unique(as_array(found.rows)).tolist()
    return {
        "rule": rule,
        "level": RULES[rule].level,
        "file": file_name,
        "title": RULES[rule].title,
        "hint": RULES[rule].hint,
        "findings": found.count,
        "rows": rows,
        "listed": [_finding_data(finding, report.image_scan) for finding in found.listed],
    }


def _finding_data(finding: CheckFinding, image_scan: ImageScan) -> dict[str, Any]:
    data: dict[str, Any] = {"rows": list(finding.rows), "message": finding.message}
    if finding.images:
        data["images"] = [image_scan.name(place) for place in finding.images]
    if finding.other_rows:
        data["other_rows"] = list(finding.other_rows)
    return data


MAX_NAMES = 6
MAX_CLASSES = 5
WIDTH = 118
"""Limits of the text summary: image names per rule, classes per field, characters per line."""


def report_summary(report: CheckReport, *, strict: bool) -> str:
    """Return a report as summary text."""
    lines = list(_facts(report))
    for level in ("error", "warning"):
        found = report.findings.rules(level)
        lines.append(f"{level}s: {report.findings.count(level) or 'none'}")
        for rule, file in found:
            lines += _rule_lines(report, rule, file)
    status = report.exit_status(strict=strict)
    lines.append(f"result: {'errors' if report.findings.count('error') else 'no errors'}, exit status {status}")
    return "\n".join(map(visible, lines)) + "\n"


def _facts(report: CheckReport) -> Iterator[str]:
    for scan, title in zip(report.scans, ("", "against "), strict=False):
        yield f"{title}{scan.path.name}: {_rows(scan)}"
    yield f"not trainable: {report.num_not_trainable()} rows"
    yield _images(report)
    if len(report.scans) > 1:
        yield person_line(report)
    lengths = report.scans[FILE].lengths.table()
    if lengths is not None:
        yield from pair_lines(lengths)
    labels = report.scans[FILE].labels.table()
    if labels is not None:
        yield from label_lines(labels)
    classes = report.scans[FILE].balance.tables()
    if classes:
        yield "classes: " + "; ".join(f"{name} {_shares(counts)}" for name, counts in list(classes.items())[:4])
    if report.tokens is not None:
        yield token_line(report.tokens)
    if report.num_uncompared:
        yield f"near-duplicates: {report.num_uncompared} candidate pairs were not compared (limit reached)"
    if report.scans[FILE].repairs:
        repairs = "; ".join(f"{count} x {what}" for what, count in report.scans[FILE].repairs.most_common(3))
        yield f"read leniently: {repairs} (--fix writes them in normalized form)"


def _rows(scan: FileScan) -> str:
    questions = f", {scan.num_questions} from a question file" if scan.num_questions else ""
    turns = sum(number * count for number, count in scan.balance.turns.items())
    return f"{scan.index.num_rows} rows, {scan.num_readable} readable with {turns} questions{questions}"


def _images(report: CheckReport) -> str:
    data = image_data(report.image_scan)
    if not data["opened"]:
        return f"images: {data['named']} named, none opened (pass --images DIR)"
    sides = ", ".join(
        f"{name} {side['smallest']} to {side['largest']} (median {side['median']})"
        for name, side in data["sides"].items()
    )
    forms = ", ".join(f"{count} {name}" for name, count in list(data["forms"].items())[:4])
    return f"images: {data['named']} named, {data['decoded']} decoded: {forms}; {sides}"


def person_line(report: CheckReport) -> str:
    """Return a line that states by which fields patients and studies were compared."""
    # Without this line, a check without comparable fields would look like a check without leaks.
    counts = report.num_persons()
    both = [f"{name} ({own} and {other} distinct)" for name, (own, other) in counts.items() if own and other]
    if both:
        return f"persons: compared by {', '.join(both)}"
    alone = "".join(f"; only one file has {name}" for name in counts)
    return f"persons: NOT compared; no field with patient or study ids is in both files (--group-fields){alone}"


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    shown = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in list(counts.items())[:MAX_CLASSES])
    return f"({shown}{', ...' if len(counts) > MAX_CLASSES else ''})"


def token_line(tokens: TokenBudget) -> str:
    """Return the token counts of a model as one line."""
    without = f", {tokens.num_without_answer} of them lose their whole answer" if tokens.num_without_answer else ""
    return (
        f"tokens: median {tokens.median}, longest {tokens.longest} (row {tokens.longest_row}); "
        f"--max-length {tokens.limit} truncates {tokens.num_shortened} of {tokens.num_rows} rows{without}; "
        f"--model-max-length {tokens.suggested} fits all, {tokens.suggested_most} fits 99.9 %"
    )


def _rule_lines(report: CheckReport, rule: str, file: int) -> list[str]:
    found = report.findings.of(rule, file)
    place = "" if len(report.scans) == 1 or (RULES[rule].level == "error" and rule.startswith("leak")) else _where(file)
    head = f"  {found.count:>6}  {RULES[rule].title}{place}{_shared(found, rule)} [{rule}]"
    first = found.listed[0]
    rows = f"row{'s' if len(first.rows) > 1 else ''} {_numbers(first.rows)}"
    others = f" and {_numbers(first.other_rows)} of the other file" if first.other_rows else ""
    shown = [f"{head}: {RULES[rule].hint}"]
    if first.images:
        names = [report.image_scan.name(finding.images[0]) for finding in found.listed[:MAX_NAMES] if finding.images]
        shown.append(f"          {', '.join(dict.fromkeys(names))}{', ...' if found.count > len(names) else ''}")
    message = "" if first.images or first.message == RULES[rule].title else f": {first.message}"
    if first.rows:
        shown.append(f"          first: {rows}{others}{message}")
    return [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in map(visible, shown)]


def _shared(found: RuleFindings, rule: str) -> str:
    """Return how many near-duplicate findings are about both files, as those may be leaks."""
    num_both = sum(bool(finding.other_rows) for finding in found.listed) if rule == "near-duplicate" else 0
    return f" ({num_both} of them in both files)" if num_both else ""


def _numbers(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:4])) + (", ..." if len(rows) > 4 else "")


def _where(file: int) -> str:
    return " (in the other file)" if file == AGAINST else ""
