"""What the two published releases of the chat evaluation do that this one does only on request.

Every deviation has a name and a switch; a release is a set of names. Without any, questions are joined by id, the judge
reads clean text, and a reply counts only when it holds two scores on the scale.
"""

from __future__ import annotations

from llava.errors import ConfigError
from llava.eval.medvqa.metrics import Defect, parse_defects
from llava.utils.lookup import lookup

DEFECTS: dict[str, Defect] = {
    "joined_by_order": Defect("questions and answers are paired by their place in the files, ids are not read", "8.10"),
    "cut_question": Defect("the judge sees the question without its last 8 characters, whatever they are", "8.10"),
    "tag_in_question": Defect("the judge sees the image mark of the question", "8.10"),
    "python_mentions": Defect(
        "the judge sees mentions as Python writes the list, and None where there are none", "8.10"
    ),
    "literal_scores": Defect("a reply counts when its first line is two numbers with one space, of any size", "8.10"),
    "minus_one_counts": Defect("a review that was not understood counts as scores of -1 and -1 in the means", "8.10"),
    "judged_failures": Defect("an answer that could not be generated is judged as an empty one", "8.10"),
}
"""By name; the row is the section of the specification."""

RELEASES: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "v1.0": frozenset(DEFECTS) - {"tag_in_question"},
    "v1.5": frozenset(DEFECTS) - {"cut_question", "minus_one_counts"},
}

REPLY_KEYS = {"none": "result", "v1.0": "result", "v1.5": "gpt_eval"}
"""Under which name a row of scores holds the judge's reply."""


def chosen_defects(release: str, added: list[str], fixed: list[str]) -> frozenset[str]:
    """Return the defects of a release, with some added and some repaired.

    Raises:
        ConfigError: a name is unknown, or two of the defects contradict each other.
    """
    chosen = lookup(RELEASES, release, "release") | parse_defects(added, DEFECTS)
    chosen -= parse_defects(fixed, DEFECTS)
    if {"cut_question", "tag_in_question"} <= chosen:
        raise ConfigError("cut_question and tag_in_question contradict each other: repair one of them with --fix")
    return chosen
