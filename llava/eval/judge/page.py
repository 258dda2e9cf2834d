"""HTML page of judged answers: tables, and cases with both answers, scores and the judge's reply.

The page makes no requests. It contains texts and images of the data, so the rules of the data apply to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava.eval.intervals import interval_text, percent_text
from llava.eval.judge.scores import Rated
from llava.eval.judge.summary import MEASURES
from llava.imaging.decode import load_image
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import OpenImage, fact_lines, html_thumbnail, render_page


def write_scores_page(
    path: str | Path,
    scores: str | Path,
    rated: Sequence[Rated],
    report: Mapping[str, Any],
    *,
    image_folder: str | Path | None = None,
    num_examples: int = 12,
) -> None:
    """Write the page of one file of scores.

    Args:
        path: the page.
        scores: the file of scores, for the texts of the examples.
        rated: the rows of that file.
        report: the summary of the rows, with `provenance`.
        image_folder: folder of the images; with None, the page shows none.
        num_examples: number of judged answers to show.
    """

    def open_image(name: str) -> Image.Image:
        return load_image(name, image_folder)

    rows = list(read_records(scores))
    headings = {"orders": "The same judge in both orders", "agreement": "Two judges"}
    opener = None if image_folder is None else open_image
    text = render_page(
        "judge.html",
        title="Judged chat answers",
        groups=_groups(report["groups"]),
        failures=list(report["failures"].items()),
        agreements=[_agreement(heading, report[key]) for key, heading in headings.items() if report.get(key)],
        cases=[_case(rows[index], rated[index], opener) for index in choose_examples(rated, num_examples)],
        provenance=fact_lines(report.get("provenance", {})),
    )
    write_atomic(path, text)


def choose_examples(rated: Sequence[Rated], num_examples: int) -> list[int]:
    """Return indices of examples, in turn: without a score, lowest, highest and middle relative score."""
    failed = [index for index, one in enumerate(rated) if one.scores is None]
    order = sorted((one.scores[1] / one.scores[0], index) for index, one in enumerate(rated) if one.scores is not None)
    ranked = [index for _, index in order]
    middle = sorted(range(len(ranked)), key=lambda place: abs(place - len(ranked) // 2))
    queues = [failed, ranked[:], ranked[::-1], [ranked[place] for place in middle]]
    chosen: list[int] = []
    while any(queues) and len(chosen) < num_examples:
        queue = queues.pop(0)
        queues.append(queue)
        while queue:
            index = queue.pop(0)
            if index not in chosen:
                chosen.append(index)
                break
    return chosen


def _groups(groups: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for name, group in groups.items():
        cells = [name, str(group["data_size"]), str(group["asked"])]
        cells += [percent_text(group[key]["value"]) for key in ("gpt4_score", "pred_score")]
        for key in ("pred_relative_score", "ratio_of_means"):
            cells += [percent_text(group[key]["value"]), interval_text(group[key])]
        rows.append(cells)
    return rows


def _agreement(heading: str, report: Mapping[str, Any]) -> dict[str, Any]:
    def cell(estimate: Mapping[str, float | None]) -> str:
        return f"{percent_text(estimate['value'])} {interval_text(estimate)}"

    rows = [[name, cell(report["reference"][name]), cell(report["answer"][name])] for name in MEASURES]
    rows.append(["same winner", "", cell(report["winner"]["exact"])])
    if "first place" in report:
        rows.append(["gain of the first place", "", cell(report["first place"])])
    return {"heading": heading, "num_questions": report["num_questions"], "rows": rows}


def _case(row: Mapping[str, Any], one: Rated, open_image: OpenImage | None) -> dict[str, Any]:
    """Return one judged answer with its image and its texts by name."""
    scores = one.failure if one.scores is None else f"reference {one.scores[0]:g}, answer {one.scores[1]:g}"
    replies = {key: row[key] for key in ("result", "gpt_eval", "result_swapped", "gpt_eval_swapped") if row.get(key)}
    pairs = [
        ("question", row.get("question")),
        ("reference", row.get("ans1")),
        ("answer", row.get("ans2")),
        ("scores", scores),
        *(("judge" if not key.endswith("swapped") else "judge, swapped", text) for key, text in replies.items()),
        ("id, type, domain", f"{one.id}, {one.type}, {' '.join(one.domains)}"),
    ]
    return {"image": html_thumbnail(one.image, open_image), "facts": [pair for pair in pairs if pair[1] is not None]}
