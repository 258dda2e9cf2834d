"""Agreement of judges with references, compared with the rule that the longer answer wins.

judged rows with a reference --pairs that the reference decides--> share of agreement, interval by image
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llava.data.groups import image_name_key
from llava.instruct.preferences.judges import DEFAULT_MARGINS, by_reference
from llava.instruct.preferences.rows import Answered
from llava.scoring.decisions import words_of
from llava.utils.bootstrap import confidence_interval

COIN = 0.5


def judged_pairs(judged: Sequence[Answered]) -> list[tuple[Answered, int, int]]:
    """Return the questions with a preference, and the places of the preferred and the rejected answer."""
    found = []
    for one in judged:
        judgment = one.row.get("judgment")
        if isinstance(judgment, Mapping) and judgment.get("preferred") is not None:
            found.append((one, int(judgment["preferred"]), int(judgment["rejected"])))
    return found


def length_report(pairs: Sequence[tuple[Answered, int, int]]) -> dict[str, Any]:
    """Return mean words of preferred and rejected answers, and the share of longer preferred ones."""
    if not pairs:
        return {"preferred_words": None, "rejected_words": None, "longer_preferred": None}
    sizes = [[len(words_of(one.answers[place])) for place in places] for one, *places in pairs]
    return {
        "preferred_words": round(sum(one for one, _ in sizes) / len(sizes), 2),
        "rejected_words": round(sum(other for _, other in sizes) / len(sizes), 2),
        "longer_preferred": _share([_longer(one, other) for one, other in sizes]),
    }


def _longer(one: int, other: int) -> float:
    """Return 1 if the first is larger, 0 if the second is, and a half for equal ones."""
    return 0.5 if one == other else float(one > other)


def agreement_report(pairs: Sequence[tuple[Answered, int, int]], *, seed: int = 0) -> dict[str, Any] | None:
    """Return how often preferences agree with references; None without a pair that a reference decides.

    The same pairs give the share that "the longer answer wins" gets right; answers of equal length count as a half.

    Args:
        pairs: questions with their preferred and rejected answers.
        seed: seed of the intervals, which resample images.
    """
    values: list[tuple[float, float]] = []
    clusters: list[str] = []
    for one, preferred, rejected in pairs:
        scores = by_reference(replace(one, answers=(one.answers[preferred], one.answers[rejected])))
        if isinstance(scores, str) or abs(scores[0] - scores[1]) < DEFAULT_MARGINS["reference"]:
            continue
        is_right = scores[0] > scores[1]
        sizes = [len(words_of(one.answers[place])) for place in (preferred, rejected)]
        longer = _longer(*sizes)
        values.append((float(is_right), longer if is_right else 1 - longer))
        clusters.append(" ".join(map(image_name_key, one.asked.images)) or one.asked.key)
    if not values:
        return None
    table = np.asarray(values)
    columns = {"judge": 0, "longer_wins": 1}
    report: dict[str, Any] = {"num_pairs": len(values), "coin": COIN}
    for name, column in columns.items():
        interval = confidence_interval(table[:, column], _mean, clusters=clusters, seed=seed)
        report[name] = {"share": _share(table[:, column].tolist()), "interval": [round(x, 4) for x in interval]}
    return report


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _share(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def judged_report(judged: Sequence[Answered]) -> dict[str, Any]:
    """Return statistics of a file of judged rows: verdicts by reason, lengths, agreement with references."""
    pairs = judged_pairs(judged)
    failures = Counter(str(one.row["judgment"]["failure"]) for one in judged if one.row["judgment"]["failure"])
    return {
        "num_questions": len(judged),
        "num_preferences": len(pairs),
        "without_preference": dict(failures.most_common()),
        **length_report(pairs),
        "agreement": agreement_report(pairs),
    }


def report_text(report: Mapping[str, Any]) -> str:
    """Return a report as lines."""
    lines = [f"preferences   {report['num_preferences']} of {report['num_questions']} questions"]
    lines += [f"  none        {count} {reason}" for reason, count in report["without_preference"].items()]
    if report["num_preferences"]:
        lines.append(
            f"words         preferred {report['preferred_words']}, rejected {report['rejected_words']}; the longer "
            f"answer is preferred in {report['longer_preferred']:.1%}"
        )
    found = report["agreement"]
    if found is None:
        lines.append("references    none decides a pair, so agreement is unknown")
    else:
        for name, title in (("judge", "this judge"), ("longer_wins", "the longer answer wins")):
            low, high = found[name]["interval"]
            lines.append(f"references    {title}: right in {found[name]['share']:.1%} [{low:.1%}, {high:.1%}]")
        lines.append(f"              {found['num_pairs']} pairs that a reference decides; a coin: {COIN:.0%}")
    return "\n".join(lines) + "\n"
