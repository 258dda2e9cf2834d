"""Known defects of the original projects, by the names that `--compat` takes.

By default this package has none of them. `benchmarks.fidelity --compat LIST` selects the defects that may explain a
recorded number; those with a switch can be reproduced by the package itself. See docs/compatibility.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.errors import ConfigError
from llava.utils.lookup import lookup


@dataclass(frozen=True, slots=True)
class Compat:
    """Known defect of an original.

    Attributes:
        original: what the original does.
        spec: the original, or the kind of record, that shows the defect.
        switch: flag that reproduces the defect; empty if only the comparison with recorded numbers knows it.
        where: groups of commands whose `--compat` accepts the name, keys of `PLACES`.
    """

    original: str
    spec: str
    switch: str = ""
    where: tuple[str, ...] = ()


PLACES = {
    "training": "the training commands",
    "answers": "the commands that ask a model (chat, evaluation)",
}
"""Groups of commands that accept names; the comparison with recorded numbers accepts all names."""


COMPAT: dict[str, Compat] = {
    "micro_batch_loss": Compat(
        "the loss of a step is the mean of its micro-batches' means, regardless of their numbers of trained tokens",
        "recorded runs",
        "--loss-normalization micro_batches",
        ("training",),
    ),
    "cut_before_images": Compat(
        "a row is truncated to the maximum length before images are inserted: each image counts as one token",
        "LLaVA-Med",
        "--image-counts-as-one",
        ("training",),
    ),
    "beams_count_prompt": Compat(
        "the score of a beam is divided by the length of prompt and answer (transformers before 4.36)",
        "recorded generations",
        "--compat beams_count_prompt",
        ("answers",),
    ),
    "cut_prompt": Compat(
        "a prompt with images is truncated to the training length in generation, and its question is lost",
        "LLaVA-Med",
        "--compat cut_prompt",
        ("answers",),
    ),
    "counted_labels": Compat(
        "the mask of the ### templates counts the tokens of each turn tokenized alone; the count drifts into the text",
        "LLaVA-Med",
    ),
    "shifted_labels": Compat(
        "ChatML turns are counted one token off: the line end before an answer is trained, its end token is not",
        "LLaVA-Med",
    ),
    "ignored_rows": Compat(
        "a row whose counted tokens differ from its tokens is ignored as a whole, with a warning", "LLaVA-Med"
    ),
    "refused_rows": Compat("the plain template raises for rows other than one question with one answer", "LLaVA-Med"),
    "dropped_markers": Compat("the plain template drops the markers around an image", "LLaVA-Med"),
    "first_answer": Compat(
        "the ### templates keep an answer that precedes the first question, under the question's role",
        "LLaVA-Med",
    ),
    "spelled_end_marks": Compat(
        "an end token inside a text is tokenized as characters (the slow tokenizer of transformers 4.31)",
        "recorded rows",
    ),
    "random_padding": Compat(
        "the offset of a padded image is drawn from two adjacent integers, in generation too",
        "LLaVA-Med",
        "--compat random_padding",
        ("answers",),
    ),
    "grey_padding": Compat(
        "a gray image is padded with the mean of the three color channels, before it is converted to RGB", "LLaVA-Med"
    ),
    "counted_patches": Compat(
        "in image mode keep the side of a patch is taken from the image's height: the number of tokens differs from "
        "that of the tower's patches",
        "LLaVA-Med",
    ),
    "half_characters": Compat(
        "an answer that is truncated inside a character of several tokens ends with a replacement character",
        "recorded answers",
    ),
    "bare_roles": Compat(
        "the ChatML template of STLLaVA-Med writes its roles without their markers and line ends", "STLLaVA-Med"
    ),
}
"""All known defects, by name."""


def parse_compat(text: str, place: str | None = None) -> frozenset[str]:
    """Return the names of a list: separated by commas, or `all`, or `none`.

    Args:
        text: the list.
        place: key of `PLACES` whose names are accepted; None for all names.

    Raises:
        ConfigError: a name is unknown, or has no effect in `place`.
    """
    known = [name for name, case in COMPAT.items() if place is None or place in case.where]
    if text in ("all", "none"):
        return frozenset(known) if text == "all" else frozenset()
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    choice = f"{', '.join(known)}, all, none"
    if unknown := sorted(names - set(COMPAT)):
        raise ConfigError(f"--compat: unknown name {', '.join(unknown)}; known: {choice}")
    if elsewhere := sorted(names - set(known)):
        raise ConfigError(
            f"--compat: {', '.join(elsewhere)} has no effect in {PLACES[str(place)]}; accepted there: {choice}"
        )
    return names


def compat_help(place: str) -> str:
    """Return the help text of `--compat` for a group of commands."""
    names = ", ".join(name for name, case in COMPAT.items() if place in case.where)
    return f"defects of the original projects to reproduce: {names}, all or none (docs/compatibility.md)"


def compat_table() -> str:
    """Return all defects as text, one per line: name, what the original does, its source, switch."""
    return "\n".join(
        f"{name:20} {case.original} [{case.spec}]{f' ({case.switch})' if case.switch else ''}"
        for name, case in COMPAT.items()
    )


DEFECTS: dict[str, str] = {
    "precision_as_exact_match": "'exact match' is the share of the answer's words found in the reference",
    "prediction_counts": "F1 counts a shared word as often as the answer repeats it",
    "single_order_bleu": "bleu_score_2 and _3 use n-grams of one length only, not of all lengths up to it",
    "unsmoothed_bleu": "BLEU of an answer without a common 4-gram is about 1e-155 or less, not small",
    "period_limit": "at most 32 periods are deleted, since a flag is passed as a count",
    "first_candidate": "run_eval: an answer that shares no word with any candidate selects the first",
    "substring_open": "run_eval_batch: an open answer is right if it contains the reference as a substring",
    "substring_closed": "a closed answer is right if it contains the reference as a substring ('normal' has 'no')",
    "yes_no_only": "run_eval: a closed reference other than yes and no is hardly ever counted as right",
    "swapped_counts": "run_eval prints the number of closed questions as num_open and the reverse",
    "dropped_closed_misses": "misses on closed questions are not counted (PathVQA scripts)",
}
"""Known defects of the published scores, and their effects."""


def parse_defects(names: Sequence[str], table: Mapping[str, str] = DEFECTS) -> frozenset[str]:
    """Return the selected names of `table`; `all` selects every name, `none` no name.

    Raises:
        ConfigError: a name is unknown.
    """
    chosen: set[str] = set()
    for name in names:
        if name == "all":
            chosen |= table.keys()
        elif name != "none":
            lookup(table, name, "defect")
            chosen.add(name)
    return frozenset(chosen)
