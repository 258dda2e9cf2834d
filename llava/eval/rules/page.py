"""Page of an evaluation with rules: figures, and wrong or contradictory conversations with images.

The page makes no requests. It contains questions, answers and images of the data, so the rules of the data apply to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.eval.rules.report import facts_of, node_table, score_table, style_table
from llava.eval.rules.scores import HeldDialogue
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import OpenImage, fact_lines, html_thumbnail, render_page


def write_page(
    path: Path,
    *,
    title: str,
    report: Mapping[str, Any],
    held: Sequence[HeldDialogue],
    open_image: OpenImage | None,
    num_examples: int = 12,
    note: str = "",
) -> None:
    """Write the page of one evaluation."""
    text = render_page(
        "rules_evaluation.html",
        title=title,
        note=note,
        counts=", ".join(f"{name} {number}" for name, number in report["counts"].items() if name != "diagnosis"),
        scores=score_table(report),
        styles=style_table(report),
        nodes=node_table(report),
        facts=facts_of(report),
        cases=[case_html(dialogue, open_image) for dialogue in choose_examples(held, num_examples)],
        provenance=fact_lines(report.get("provenance", {})),
    )
    write_atomic(path, text)


def choose_examples(held: Sequence[HeldDialogue], num_examples: int) -> list[HeldDialogue]:
    """Return contradictory and wrong conversations in turn, each image once while there are others."""
    contradictory = [dialogue for dialogue in held if dialogue.violations]
    wrong = [dialogue for dialogue in held if not dialogue.violations and not all(dialogue.right)]
    queues = [queue for queue in (contradictory, wrong) if queue]
    chosen: list[HeldDialogue] = []
    while queues and len(chosen) < num_examples:
        queue = queues.pop(0)
        shown = {dialogue.asked.image for dialogue in chosen}
        picked = next((dialogue for dialogue in queue if dialogue.asked.image not in shown), queue[0])
        chosen.append(picked)
        queue.remove(picked)
        if queue:
            queues.append(queue)
    return chosen


def case_html(dialogue: HeldDialogue, open_image: OpenImage | None) -> dict[str, Any]:
    """Return one conversation with its image for the template."""
    asked = dialogue.asked
    turns = zip(asked.asked, asked.questions, dialogue.answers, dialogue.values, dialogue.right, strict=True)
    return {
        "image": html_thumbnail(asked.image, open_image),
        "label": f"{asked.id}, {asked.hint or asked.style}",
        "truth": ", ".join(f"{id} {asked.truth[id]}" for id in asked.asked),
        "broken": ", ".join(dialogue.violations),
        "turns": [
            {
                "question": question.replace(IMAGE_TOKEN, "").strip(),
                "answer": answer if answer or not dialogue.failed else "(failed)",
                "value": f"{id}: {value.strip('_')}",
                "right": right,
            }
            for id, question, answer, value, right in turns
        ],
    }
