"""Where the original projects are wrong: what they do, and the names under which their recorded numbers are matched.

By default this package does the right thing. `benchmarks.fidelity --compat LIST` says which of these may explain a
recorded number; those with a switch can be had in the package itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llava.errors import ConfigError
from llava.utils.lookup import lookup


@dataclass(frozen=True, slots=True)
class Compat:
    """One such case.

    Attributes:
        original: what the original does.
        spec: where the specifications say so.
        switch: what turns it on here; empty where only the comparison knows it.
        where: the commands whose `--compat` takes it, see `PLACES`.
    """

    original: str
    spec: str
    switch: str = ""
    where: tuple[str, ...] = ()


PLACES = {
    "training": "the training commands",
    "answers": "the commands that ask a model (chat, evaluation)",
}
"""What takes names besides the comparison with recorded numbers, which takes all."""


COMPAT: dict[str, Compat] = {
    "micro_batch_loss": Compat(
        "the loss of a step is the mean of its micro-batches' means, whatever the number of their trained tokens",
        "recorded runs",
        "--loss_normalization micro_batches",
        ("training",),
    ),
    "cut_before_images": Compat(
        "a row is cut to the maximum length before images are put in: each image counts as one token",
        "llava-med 1.8",
        "--image_counts_as_one",
        ("training",),
    ),
    "beams_count_prompt": Compat(
        "the score of a beam is divided by the length of prompt and answer (transformers before 4.36)",
        "recorded generations",
        "--compat beams_count_prompt",
        ("answers",),
    ),
    "cut_prompt": Compat(
        "a prompt with images is cut to the training length when it is answered, and its question is lost",
        "llava-med 1.7, step 6",
        "--compat cut_prompt",
        ("answers",),
    ),
    "counted_labels": Compat(
        "the mask of the ### form counts the tokens of each turn tokenized alone; the count drifts into the text",
        "llava-med 2.5",
    ),
    "shifted_labels": Compat(
        "ChatML turns are counted one token off: the line end before an answer is trained, its end mark is not",
        "llava-med 2.5",
    ),
    "ignored_rows": Compat(
        "a row whose counted tokens differ from its tokens is ignored as a whole, with a warning", "llava-med 2.5"
    ),
    "refused_rows": Compat(
        "the plain template raises for other rows than one question with one answer", "llava-med 2.5"
    ),
    "dropped_markers": Compat("the plain template throws the markers around an image away", "llava-med 2.5"),
    "first_answer": Compat(
        "the ### form keeps an answer that stands before the first question, under the question's role",
        "llava-med 2.5",
    ),
    "spelled_end_marks": Compat(
        "an end mark inside a text is tokenized as characters (the slow tokenizer of transformers 4.31)",
        "recorded rows",
    ),
    "random_padding": Compat(
        "the offset of a padded picture is drawn from two neighbouring integers, in answering too",
        "llava-med 1.5",
        "--compat random_padding",
        ("answers",),
    ),
    "grey_padding": Compat(
        "a grey picture is padded with the mean of the three colours, before it is converted to colour", "llava-med 1.5"
    ),
    "counted_patches": Compat(
        "in image mode keep the side of a patch is taken from the picture's height: the tokens are not as many as the "
        "tower's patches",
        "llava-med 1.5",
    ),
    "half_characters": Compat(
        "an answer that is cut inside a character of several tokens ends with a replacement character",
        "recorded answers",
    ),
    "bare_roles": Compat(
        "the ChatML template of STLLaVA-Med writes its roles without their marks and line ends", "stllava-med 3"
    ),
}
"""Every case, by name."""


def parse_names(text: str, place: str | None = None) -> frozenset[str]:
    """Read a list of names: separated by commas, or `all`, or `none`.

    Args:
        text: the list.
        place: key of `PLACES`, whose names alone count; None for all.

    Raises:
        ConfigError: a name is unknown, or does nothing there.
    """
    known = [name for name, case in COMPAT.items() if place is None or place in case.where]
    if text in ("all", "none"):
        return frozenset(known) if text == "all" else frozenset()
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    choice = f"{', '.join(known)}, all, none"
    if unknown := sorted(names - set(COMPAT)):
        raise ConfigError(f"--compat: unknown compatibility name {', '.join(unknown)}; known: {choice}")
    if elsewhere := sorted(names - set(known)):
        raise ConfigError(
            f"--compat: {', '.join(elsewhere)} does nothing in {PLACES[str(place)]}; of use there: {choice}"
        )
    return names


def help_text(place: str) -> str:
    """What `--compat` does in a command, for its help."""
    names = ", ".join(name for name, case in COMPAT.items() if place in case.where)
    return f"do as the original projects where they are wrong: {names}, all or none (docs/compatibility.md)"


def table() -> str:
    """The cases as text, one a line: name, what the original does, where it is specified, switch."""
    return "\n".join(
        f"{name:20} {case.original} [{case.spec}]{f' ({case.switch})' if case.switch else ''}"
        for name, case in COMPAT.items()
    )


class Defect(NamedTuple):
    """A known defect of the published scores: what it does, and the row of the specification that found it."""

    effect: str
    row: str


DEFECTS: dict[str, Defect] = {
    "precision_as_exact_match": Defect(
        "'exact match' is the share of the answer's words found in the reference", "8.5"
    ),
    "prediction_counts": Defect("F1 counts a shared word as often as the answer repeats it", "8.5"),
    "single_order_bleu": Defect("bleu_score_2 and _3 look at n-grams of one length only, not up to it", "8.5"),
    "unsmoothed_bleu": Defect("BLEU of an answer without a common 4-gram is about 1e-155 or less, not small", "8.5"),
    "period_limit": Defect("at most 32 full stops are deleted, since a flag is passed as a count", "8.4"),
    "first_candidate": Defect("run_eval: an answer that shares no word with any candidate selects the first", "8.5"),
    "substring_open": Defect("run_eval_batch: an open answer is right that contains the reference's letters", "8.5"),
    "substring_closed": Defect("a closed answer is right that contains the reference: 'normal' has a 'no'", "8.5"),
    "yes_no_only": Defect("run_eval: a closed reference other than yes and no can hardly be hit", "8.5"),
    "swapped_counts": Defect("run_eval prints the number of closed questions as num_open and the reverse", "8.6"),
    "dropped_closed_misses": Defect("misses on closed questions are not counted (PathVQA scripts)", "8.7"),
}


def parse_defects(names: Sequence[str], table: Mapping[str, Defect] = DEFECTS) -> frozenset[str]:
    """Check names of defects in `table`; `all` and `none` stand for what they say.

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
