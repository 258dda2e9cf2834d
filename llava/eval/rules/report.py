"""Report of an evaluation with a rule set: all figures as JSON values, and as text tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.intervals import interval_text, percent_text
from llava.eval.rules.scores import DialogueScores, HeldDialogue, flips, order_invariance
from llava.symbolic.cue_lists import EXTRACTOR_VERSION, cues_sha256
from llava.symbolic.structure import RuleSet
from llava.utils.bootstrap import LEVEL
from llava.utils.reporting import Cell, text_table

STYLE_SCORES = ("A_Q", "A_C", "A_D", "no match", "contradictory")
"""Scores that are reported by style."""


def full_report(
    rules: RuleSet,
    held: Sequence[HeldDialogue],
    *,
    blank: Sequence[HeldDialogue] | None = None,
    num_resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the conversations' figures as JSON values: percentages with intervals clustered by group.

    Args:
        rules: rule set.
        held: conversations, also those with wrong hints, which count for `flips` only.
        blank: the same conversations about a gray image, in the same order.
        num_resamples: number of resamples of the intervals.
        seed: seed of the resampling.
    """
    draws: dict[str, int] = {"num_resamples": num_resamples, "seed": seed}
    plain = [index for index, dialogue in enumerate(held) if not dialogue.asked.hint]
    mine = DialogueScores(rules, [held[index] for index in plain], **draws)
    gray = None if blank is None else DialogueScores(rules, [blank[index] for index in plain], **draws)
    styles = dict.fromkeys(dialogue.asked.style for dialogue in mine.held)
    return {
        "rules": {
            "id": rules.id,
            "version": rules.version,
            "sha256": rules.sha256,
            "extractor": EXTRACTOR_VERSION,
            "cues_sha256": cues_sha256(rules.primary.language),
        },
        "counts": counts(rules, held),
        "scores": mine.scores(gray),
        "contradictions": mine.contradictions(),
        "nodes": mine.nodes(),
        "styles": {
            style: {
                key: score["answered"]
                for key, score in DialogueScores(rules, [d for d in mine.held if d.asked.style == style], **draws)
                .scores()
                .items()
                if key in STYLE_SCORES
            }
            for style in styles
        },
        "order_invariance": order_invariance(mine.held, **draws),
        "flips": flips(held, **draws),
        "intervals": {"level": LEVEL, "clusters": "group", **draws},
    }


def counts(rules: RuleSet, held: Sequence[HeldDialogue]) -> dict[str, Any]:
    """Return the numbers of conversations, questions, images, groups and failures."""
    return {
        "conversations": len(held),
        "with hints": sum(bool(dialogue.asked.hint) for dialogue in held),
        "questions": sum(len(dialogue.asked.asked) for dialogue in held),
        "images": len({dialogue.asked.image for dialogue in held}),
        "groups": len({dialogue.asked.group for dialogue in held}),
        "failed": sum(dialogue.failed for dialogue in held),
        "unfinished answers": sum(dialogue.unfinished for dialogue in held),
        "diagnosis": dict(Counter(dialogue.asked.truth.get(rules.primary.id, "") for dialogue in held).most_common()),
    }


def estimate_text(estimate: Mapping[str, Any], *, signed: bool = False) -> str:
    """Return an estimate as its value and interval."""
    return f"{percent_text(estimate['value'], signed=signed)} {interval_text(estimate)}"


def score_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Return headers and rows of the scores."""
    scores = report["scores"]
    headers = ["score", "n", "%", "95 % interval"]
    with_blank = any("blank" in score for score in scores.values())
    headers += ["blank image", "from the image"] if with_blank else []
    rows: list[list[Cell]] = []
    for name, score in scores.items():
        answered = score["answered"]
        row: list[Cell] = [name, answered["num_items"], percent_text(answered["value"]), interval_text(answered)]
        if with_blank:
            row += [percent_text(score["blank"]["value"]), estimate_text(score["difference"], signed=True)]
        rows.append(row)
    return headers, rows


def style_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Return headers and rows of the scores by style."""
    rows: list[list[Cell]] = [
        [style, *(estimate_text(scores[key]) for key in STYLE_SCORES)] for style, scores in report["styles"].items()
    ]
    return ["style", *STYLE_SCORES], rows


def node_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Return headers and rows of the scores by node."""
    rows: list[list[Cell]] = [
        [node, scores["accuracy"]["num_items"], estimate_text(scores["accuracy"]), estimate_text(scores["macro_f1"])]
        for node, scores in report["nodes"].items()
    ]
    return ["node", "n", "accuracy, %", "macro-F1, %"], rows


def facts_of(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures outside of the tables as pairs of a name and a text."""
    broken = report["contradictions"]
    mean = broken["per_conversation"]
    interval = "-" if mean["value"] is None else f"{mean['value']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"
    facts = [("contradictions a conversation", interval)]
    facts += [(f"broken: {id}", str(number)) for id, number in broken["by_constraint"].items()]
    if report["order_invariance"] is not None:
        facts.append(("same value in all orders, %", estimate_text(report["order_invariance"])))
    facts += [(f"right answers lost by {hint}, %", estimate_text(found)) for hint, found in report["flips"].items()]
    return facts


def report_text(report: Mapping[str, Any]) -> str:
    """Return all tables of a report."""
    count = report["counts"]
    asked = f"{count['conversations']} conversations ({count['with hints']} with wrong hints)"
    lost = f"{count['failed']} failed, {count['unfinished answers']} answers unfinished"
    parts = [f"{asked} about {count['images']} images, {count['questions']} questions; {lost}"]
    parts += [text_table(*table(report)) for table in (score_table, style_table, node_table)]
    parts.append("\n".join(f"{name}: {text}" for name, text in facts_of(report)))
    return "\n\n".join(parts)
