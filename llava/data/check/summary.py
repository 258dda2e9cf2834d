"""The result of a check on one screen: what the files hold, what was found, worst first, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from llava.data.check.findings import AGAINST, FILE, Found
from llava.data.check.report import Report, picture_data
from llava.data.check.rules import RULES
from llava.data.check.scan import Scan
from llava.data.check.tokens import TokenBudget

MAX_NAMES = 6
MAX_CLASSES = 5
WIDTH = 118


def summary(report: Report, *, strict: bool) -> str:
    """Return the summary as lines of text."""
    lines = list(_facts(report))
    for level in ("error", "warning"):
        found = report.findings.rules(level)
        lines.append(f"{level}s: {report.findings.count(level) or 'none'}")
        for rule, file in found:
            lines += _rule_lines(report, rule, file)
    status = report.exit_status(strict=strict)
    lines.append(f"result: {'errors' if report.findings.count('error') else 'no errors'}, exit status {status}")
    return "\n".join(lines) + "\n"


def _facts(report: Report) -> Iterator[str]:
    for scan, title in zip(report.scans, ("", "against "), strict=False):
        yield f"{title}{scan.path.name}: {_rows(scan)}"
    yield f"not trainable: {report.num_not_trainable()} rows"
    yield _pictures(report)
    if len(report.scans) > 1:
        yield person_line(report)
    classes = report.scans[FILE].balance.tables()
    if classes:
        yield "classes: " + "; ".join(f"{name} {_shares(counts)}" for name, counts in list(classes.items())[:4])
    if report.tokens is not None:
        yield token_line(report.tokens)
    if report.num_uncompared:
        yield f"look-alikes: {report.num_uncompared} candidate pairs were not compared, as there were too many"
    if report.scans[FILE].repairs:
        repairs = "; ".join(f"{count} x {what}" for what, count in report.scans[FILE].repairs.most_common(3))
        yield f"read leniently: {repairs} (--fix writes them as they should be)"


def _rows(scan: Scan) -> str:
    questions = f", {scan.num_questions} of a question file" if scan.num_questions else ""
    turns = sum(number * count for number, count in scan.balance.turns.items())
    return f"{scan.ledger.num_rows} rows, {scan.num_readable} readable with {turns} questions{questions}"


def _pictures(report: Report) -> str:
    data = picture_data(report.pictures)
    if not data["opened"]:
        return f"pictures: {data['named']} named, none opened (give --images DIR)"
    sides = ", ".join(
        f"{name} {side['smallest']} to {side['largest']} (median {side['median']})"
        for name, side in data["sides"].items()
    )
    forms = ", ".join(f"{count} {name}" for name, count in list(data["forms"].items())[:4])
    return f"pictures: {data['named']} named, {data['decoded']} decoded: {forms}; {sides}"


def person_line(report: Report) -> str:
    """Say by which fields patients and studies were compared: that nothing was found must not mean that nothing was."""
    counts = report.num_persons()
    both = [f"{name} ({own} and {other} different)" for name, (own, other) in counts.items() if own and other]
    if both:
        return f"persons: compared by {', '.join(both)}"
    alone = "".join(f"; only one file has {name}" for name in counts)
    return f"persons: NOT compared, no field that names a patient or a study is in both files (--group_fields){alone}"


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    shown = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in list(counts.items())[:MAX_CLASSES])
    return f"({shown}{', ...' if len(counts) > MAX_CLASSES else ''})"


def token_line(tokens: TokenBudget) -> str:
    """Return what the rows need with a model's tokenizer, in one line."""
    without = f", {tokens.num_without_answer} of them lose their whole answer" if tokens.num_without_answer else ""
    return (
        f"tokens: median {tokens.median}, longest {tokens.longest} (row {tokens.longest_row}); at most {tokens.limit} "
        f"shortens {tokens.num_shortened} of {tokens.num_rows} rows{without}; --model_max_length {tokens.suggested} "
        f"holds all, {tokens.suggested_most} holds 99.9 %"
    )


def _rule_lines(report: Report, rule: str, file: int) -> list[str]:
    found = report.findings.of(rule, file)
    place = "" if len(report.scans) == 1 or (RULES[rule].level == "error" and rule.startswith("leak")) else _where(file)
    head = f"  {found.count:>6}  {RULES[rule].title}{place}{_shared(found, rule)} [{rule}]"
    first = found.listed[0]
    rows = f"row{'s' if len(first.rows) > 1 else ''} {_numbers(first.rows)}"
    others = f" and {_numbers(first.other_rows)} of the other file" if first.other_rows else ""
    shown = [f"{head}: {RULES[rule].hint}"]
    if first.images:
        names = [report.pictures.name(finding.images[0]) for finding in found.listed[:MAX_NAMES] if finding.images]
        shown.append(f"          {', '.join(dict.fromkeys(names))}{', ...' if found.count > len(names) else ''}")
    message = "" if first.images or first.message == RULES[rule].title else f": {first.message}"
    shown.append(f"          first: {rows}{others}{message}")
    return [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in shown]


def _shared(found: Found, rule: str) -> str:
    """Say how many findings that may lie within one file are about both: those may be leaks."""
    num_both = sum(bool(finding.other_rows) for finding in found.listed) if rule == "near-duplicate" else 0
    return f" ({num_both} of them in both files)" if num_both else ""


def _numbers(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:4])) + (", ..." if len(rows) > 4 else "")


def _where(file: int) -> str:
    return " (in the other file)" if file == AGAINST else ""
