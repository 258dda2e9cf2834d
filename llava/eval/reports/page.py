"""HTML page of scored reports: figures, then each report with image, findings and deciding words.

The page makes no requests and has no scripts; the filter by finding is made of radio buttons. It contains reports and
images of the data, so the rules of the data apply to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava.errors import DataError, MissingDependency
from llava.eval.reports.output import facts_text
from llava.eval.reports.rows import ReportPair
from llava.eval.reports.score import ReportScores
from llava.eval.reports.scorers import ScoreInputs
from llava.imaging.decode import load_image
from llava.report_labels.findings import FINDINGS, NO_FINDING, UNCERTAIN, Evidence, Label, ReportLabels
from llava.report_labels.labeler import label_report
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import OpenImage, fact_lines, html_thumbnail, render_page

NOTE = "The page contains reports; the rules of their data apply to it. Research use, not for diagnosis."

HEADERS = ("metric", "value", "95 % interval", "by patient", "commonest sentence")
"""First columns of the figures; those of reports without and with findings and the source follow."""

AGREEMENT, FALSE, MISSING, DOUBT = "A", "F", "M", "U"


def write_reports_page(
    path: str | Path,
    inputs: ScoreInputs,
    scores: ReportScores,
    provenance: Mapping[str, Any],
    *,
    image_folder: str | Path | None = None,
    num_examples: int = 100,
) -> None:
    """Write the page of a scored file.

    Args:
        path: the page.
        inputs: the reports.
        scores: their scores.
        provenance: protocol of the result.
        image_folder: folder of the images that the rows name; None shows no images.
        num_examples: number of reports shown, worst first.
    """
    open_image = None if image_folder is None else partial(_open, Path(image_folder))
    labeled = [(label_report(pair.prediction), label_report(pair.reference)) for pair in inputs.pairs]
    order = worst_first(scores.per_report, labeled)[:num_examples]
    cases = [case_html(inputs.pairs[i], *labeled[i], scores.per_report[i], open_image) for i in order]
    counts = {name: sum(_id(name) in case["classes"].split() for case in cases) for name in FINDINGS}
    text = render_page(
        "reports.html",
        title=f"Report scores: {scores.num_reports} reports",
        note=NOTE,
        headers=[*HEADERS, *(f"{name} ({x['num_reports']})" for name, x in scores.extras["strata"].items()), "source"],
        metrics=[_metric_row(name, scores) for name in scores.metrics],
        texts=facts_text(scores.extras["texts"]).splitlines(),
        breakdown=_breakdown_rows(scores),
        breakdown_source=scores.extras.get("breakdown", {}).get("source", ""),
        skipped=[f"{name}: {x['reason']}" for name, x in scores.scorers.items() if x["status"] == "skipped"],
        findings=[{"id": _id(name), "name": name, "count": count} for name, count in counts.items() if count],
        cases=cases,
        provenance=fact_lines(provenance),
    )
    write_atomic(path, text)


def _open(folder: Path, name: str) -> Any:
    try:
        return load_image(name, folder)
    except MissingDependency as error:  # the decoder of a compressed DICOM file
        raise DataError(str(error)) from error


def _metric_row(name: str, scores: ReportScores) -> list[str]:
    facts = scores.metrics[name]
    clustered = facts["clustered"]
    return [
        name,
        _number(facts["value"]),
        f"[{_number(facts['ci_l'])}, {_number(facts['ci_h'])}]",
        "-" if clustered is None else f"[{_number(clustered['ci_l'])}, {_number(clustered['ci_h'])}]",
        _number(scores.extras["baseline"]["metrics"].get(name)),
        *(_number(part["metrics"][name]) for part in scores.extras["strata"].values()),
        facts["source"],
    ]


def _breakdown_rows(scores: ReportScores) -> list[list[str]]:
    """Return precision, recall, F1 and support of each finding; none without labels."""
    rows = scores.extras.get("breakdown", {}).get("n", {})
    return [
        [name, *(_number(row[key]) for key in ("precision", "recall", "f1-score")), f"{row['support']:.0f}"]
        for name, row in rows.items()
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _id(finding: str) -> str:
    """Return the id of a filter, for which the stylesheet has a rule."""
    return f"f{FINDINGS.index(finding)}"


def worst_first(rows: Sequence[Mapping[str, Any]], labeled: Sequence[tuple[ReportLabels, ReportLabels]]) -> list[int]:
    """Return the report numbers, those with the most wrong findings first, ties by lowest score."""

    def badness(index: int) -> tuple[int, float]:
        letters = finding_letters(*(side.labels for side in labeled[index])).values()
        num_wrong = sum(letter in (FALSE, MISSING) for letter in letters)
        return -num_wrong, float(rows[index].get("ROUGE-L") or 0.0)

    return sorted(range(len(rows)), key=badness)


def finding_letters(prediction: Mapping[str, Label], reference: Mapping[str, Label]) -> dict[str, str]:
    """Return for each finding that a side states or doubts, or that both deny, how the sides compare.

    A: equal; F: only the prediction states it; M: only the reference states it; U: one side is uncertain.
    """
    letters: dict[str, str] = {}
    for name in FINDINGS:
        one, other = prediction.get(name), reference.get(name)
        if one == other:
            if one is not None:
                letters[name] = AGREEMENT
        elif UNCERTAIN in (one, other):
            letters[name] = DOUBT
        elif one == 1:
            letters[name] = FALSE
        elif other == 1:
            letters[name] = MISSING
    return letters


def case_html(
    pair: ReportPair,
    prediction: ReportLabels,
    reference: ReportLabels,
    values: Mapping[str, Any],
    open_image: OpenImage | None,
) -> dict[str, Any]:
    """Return one report for the template."""
    letters = finding_letters(prediction.labels, reference.labels)
    shown = ", ".join(
        f"{name} {value:.3f}" for name, value in values.items() if isinstance(value, float) and name != "index"
    )
    return {
        "label": pair.id or f"row {pair.index}",
        "score": shown,
        "image": html_thumbnail(pair.image, open_image if pair.image else None),
        "classes": " ".join(_id(name) for name in letters),
        "tags": [{"name": name, "letter": letter} for name, letter in letters.items()],
        "sides": [
            {"name": "reference", "parts": marked_parts(pair.reference, reference, letters)},
            {"name": "prediction", "parts": marked_parts(pair.prediction, prediction, letters)},
        ],
    }


def marked_parts(text: str, found: ReportLabels, letters: Mapping[str, str]) -> list[dict[str, str]]:
    """Return a text in parts; parts that are evidence have a letter and a title."""
    parts: list[dict[str, str]] = []
    place = 0
    for part in sorted(_deciding(found), key=lambda part: (part.start, -part.end)):
        if part.start < place or part.finding not in letters:
            continue
        parts.append({"text": text[place : part.start], "letter": "", "title": ""})
        title = f"{part.finding} {part.value}" + (f" ({part.cue})" if part.cue else "")
        parts.append({"text": text[part.start : part.end], "letter": letters[part.finding], "title": title})
        place = part.end
    return [*parts, {"text": text[place:], "letter": "", "title": ""}]


def _deciding(found: ReportLabels) -> list[Evidence]:
    return [part for part in found.evidence if part.value == found.labels[part.finding] and part.finding != NO_FINDING]
