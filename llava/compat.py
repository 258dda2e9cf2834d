"""Known defects of the original projects, by the names that `--compat` takes.

By default only the published scores have defects, without which they cannot be compared with published tables.
`benchmarks.fidelity --compat LIST` selects the defects that may explain a recorded number. See docs/compatibility.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llava.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Compat:
    """Known defect of an original project.

    Attributes:
        original: what the original does.
        where: commands whose `--compat` accepts the name, key of `PLACES`; empty: only the comparison with recorded
            numbers knows it.
        spec: the original, or the kind of record, that shows the defect.
        switch: flag other than `--compat` that reproduces the defect.
    """

    original: str
    where: str = ""
    spec: str = "LLaVA-Med"
    switch: str = ""


PLACES = {
    "training": ("the training commands", "none"),
    "answers": ("the commands that ask a model (chat, evaluation)", "none"),
    "scores": ("the commands that compute published scores", "published"),
    "judge": ("the commands of the chat evaluation", "none"),
    "preferences": ("`llava preferences judge`", "none"),
}
"""Groups of commands that accept names, each with its default; comparison with recorded numbers accepts all names."""


COMPAT: dict[str, Compat] = {
    "micro_batch_loss": Compat(
        "the loss of a step is the mean of its micro-batches' means, regardless of their numbers of trained tokens",
        "training",
        "recorded runs",
        "--loss-normalization micro_batches",
    ),
    "cut_before_images": Compat(
        "a row is truncated to the maximum length before images are inserted: each image counts as one token",
        "training",
        switch="--image-counts-as-one",
    ),
    "empty_answers": Compat(
        "an answer without text is trained, so that the model learns to answer nothing: the ### and plain templates "
        "train all that surrounds an answer",
        "training",
        switch="--train-empty-answers",
    ),
    "frozen_vit_lora": Compat(
        "the adapter of the vision tower gets no gradient, and blocks above the selected layer have one too",
        "training",
        "STLLaVA-Med",
    ),
    "shared_sq_draws": Compat(
        "which questions are asked is drawn from Python's global stream, in the order in which rows are read",
        "training",
        "STLLaVA-Med",
    ),
    "policy_reference_inputs": Compat(
        "the reference of preference training sees the embeddings of the policy, so it drifts with the projector",
        "training",
        "STLLaVA-Med",
    ),
    "policy_dropout": Compat(
        "the policy is trained on pairs with dropout, which the reference does not have",
        "training",
        "STLLaVA-Med",
        "--disable-dropout False",
    ),
    "drllava": Compat(
        "PPO: the score is at the last padded position, the KL penalty of a token is at least 0, and padding is part "
        "of every mean",
        "training",
        spec="Dr-LLaVA",
    ),
    "beams_count_prompt": Compat(
        "the score of a beam is divided by the length of prompt and answer (transformers before 4.36)",
        "answers",
        "recorded generations",
    ),
    "cut_prompt": Compat(
        "a prompt with images is truncated to the training length in generation, and its question is lost", "answers"
    ),
    "counted_labels": Compat(
        "the mask counts the tokens of each turn tokenized alone, as with ###; the count drifts into the text"
    ),
    "shifted_labels": Compat(
        "ChatML turns are counted one token off: the line end before an answer is trained, its end token is not"
    ),
    "ignored_rows": Compat("a row whose counted tokens differ from its tokens is ignored as a whole, with a warning"),
    "refused_rows": Compat(
        "the plain template raises for rows other than one question with an image and one answer, most others for "
        "turns that do not alternate"
    ),
    "dropped_markers": Compat("the plain template drops the markers around an image"),
    "first_answer": Compat("the ### templates and v1_sq keep an answer that precedes the first question"),
    "image_request": Compat(
        "the template plain_qav appends a request to imagine the image, and the image again; neither is trained",
        spec="STLLaVA-Med",
    ),
    "collapsed_images": Compat(
        "several images of one turn become one: a single placeholder at its front replaces all of the turn",
        spec="recorded rows",
    ),
    "trained_image_lead": Compat(
        "of a later question that the model asks, what stands before its text is trained too: placeholder and line end",
        spec="STLLaVA-Med",
    ),
    "shifted_images": Compat(
        "the image of a row after a text-only row of its batch becomes zeros, or the image of an earlier row",
        spec="LLaVA-Med 1.0",
    ),
    "open_answers": Compat(
        "a turn without text is written as its role alone: an empty answer leaves the prompt open, without an end mark",
        spec="recorded rows",
    ),
    "trained_headers": Compat("the ### templates end a row without an answer with ### too, and train that header"),
    "stripped_marks": Compat(
        "white space beside a ChatML mark is dropped (the slow tokenizer of transformers 4.31)", spec="recorded rows"
    ),
    "spelled_end_marks": Compat(
        "an end token inside a text is tokenized as characters (the slow tokenizer of transformers 4.31)",
        spec="recorded rows",
    ),
    "unpadded_images": Compat(
        "images are cropped instead of padded when questions are asked and answered, unlike in training",
        "answers",
        "STLLaVA-Med",
    ),
    "random_padding": Compat(
        "the offset of a padded image is drawn from two adjacent integers, in generation too", "answers"
    ),
    "grey_padding": Compat(
        "a gray image is padded with the mean of the three color channels, before it is converted to RGB"
    ),
    "counted_patches": Compat(
        "in image mode keep the side of a patch is taken from the image's height: the number of tokens differs from "
        "that of the tower's patches"
    ),
    "half_characters": Compat(
        "an answer that is truncated inside a character of several tokens ends with a replacement character",
        spec="recorded answers",
    ),
    "bare_roles": Compat(
        "the ChatML template of STLLaVA-Med writes its roles without their markers and line ends", spec="STLLaVA-Med"
    ),
    "precision_as_exact_match": Compat("'exact match' is the share of the answer's words in the reference", "scores"),
    "prediction_counts": Compat("F1 counts a shared word as often as the answer repeats it", "scores"),
    "single_order_bleu": Compat("bleu_score_2 and _3 use n-grams of one length, not of all lengths up to it", "scores"),
    "unsmoothed_bleu": Compat("BLEU of an answer without a common 4-gram is about 1e-155 or less, not small", "scores"),
    "period_limit": Compat("at most 32 periods are deleted, since a flag is passed as a count", "scores"),
    "first_candidate": Compat("run_eval: an answer that shares no word with any candidate selects the first", "scores"),
    "substring_open": Compat("run_eval_batch: an open answer is right if it contains the reference", "scores"),
    "substring_closed": Compat("a closed answer is right if it contains the reference ('normal' has 'no')", "scores"),
    "yes_no_only": Compat("run_eval: a closed reference other than yes and no is rarely counted as right", "scores"),
    "swapped_counts": Compat("run_eval prints the number of closed questions as num_open and the reverse", "scores"),
    "dropped_closed_misses": Compat("misses on closed questions are not counted (PathVQA scripts)", "scores"),
    "joined_by_order": Compat("questions and answers are paired by position in the files; ids are ignored", "judge"),
    "cut_question": Compat("the judge sees the question without its last 8 characters, regardless of content", "judge"),
    "tag_in_question": Compat("the judge sees the image placeholder of the question", "judge"),
    "python_mentions": Compat("the judge sees mentions as the repr of a Python list, None without any", "judge"),
    "literal_scores": Compat("a reply counts if its first line is two numbers of any size, one space apart", "judge"),
    "minus_one_counts": Compat("an unreadable review counts as scores of -1 and -1 in the means", "judge"),
    "judged_failures": Compat("an answer whose generation failed is judged as an empty answer", "judge"),
    "second_wins_ties": Compat(
        "of two answers with equal scores the second is preferred; use it with --both-orders False",
        "preferences",
        "STLLaVA-Med",
    ),
    "first_line_scores": Compat(
        "a reply counts if its first line, with commas as spaces, is two numbers of any size, one space apart",
        "preferences",
        "STLLaVA-Med",
    ),
}
"""All known defects, by name."""


def _names(*places: str) -> frozenset[str]:
    return frozenset(name for name, case in COMPAT.items() if not places or case.where in places)


SETS = {
    "published": _names("scores") - {"dropped_closed_misses"},
    "v1.0": _names("judge") - {"tag_in_question"},
    "v1.5": _names("judge") - {"cut_question", "minus_one_counts"},
}
"""Defects of run_eval and run_eval_batch, and of the releases of the chat evaluation."""


def parse_compat(text: str, *places: str) -> frozenset[str]:
    """Return the defect names that a `--compat` list selects.

    Args:
        text: names and sets of names (`all`, `none`, `published`, `v1.0`, `v1.5`), separated by commas. `-` before one
            excludes it, wherever it stands. A place of which the list adds no name keeps its default, except with
            `all` and `none`.
        places: keys of `PLACES` whose names are accepted; without any, all names are.

    Raises:
        ConfigError: a name is unknown, or has no effect in `places`.
    """
    known, sets = _accepted(places)
    words = [word.strip() for word in text.split(",") if word.strip()]
    named = {word.removeprefix("-") for word in words} - sets.keys()
    choice = f"{', '.join(known)}, {', '.join(sets)}"
    if unknown := sorted(named - COMPAT.keys()):
        raise ConfigError(f"--compat: unknown name {', '.join(unknown)}; known: {choice}")
    if elsewhere := sorted(named.difference(known)):
        where = " and ".join(PLACES[place][0] for place in places)
        raise ConfigError(f"--compat: {', '.join(elsewhere)} has no effect in {where}; accepted there: {choice}")
    added = {name for word in words for name in sets.get(word, (word,)) if not word.startswith("-")}
    for place in () if {"all", "none"} & set(words) else places:
        added |= frozenset() if added & _names(place) else sets[PLACES[place][1]]
    return frozenset(added.difference(*(sets.get(word[1:], {word[1:]}) for word in words if word.startswith("-"))))


def _accepted(places: tuple[str, ...]) -> tuple[list[str], dict[str, frozenset[str]]]:
    """Return the accepted names and name sets of a list for `places`; all of them without places."""
    names = _names(*places)
    sets = {title: members for title, members in SETS.items() if members <= names}
    return [name for name in COMPAT if name in names], {**sets, "all": names, "none": frozenset()}


def with_aliases(compat: str, *, added: Iterable[str] = (), fixed: Iterable[str] = ()) -> str:
    """Return the `--compat` list with the names that `--with-defect`, `--release` and `--fix` stand for."""
    return ",".join([compat, *added, *(f"-{name}" for name in fixed)])


def compat_help(*places: str) -> str:
    """Return the help text of `--compat` for groups of commands."""
    known, sets = _accepted(places)
    effects = "; ".join(f"{name}: {COMPAT[name].original}" for name in known)
    return f"defects to reproduce, separated by commas; {', '.join(sets)}; -NAME excludes one. {effects}"


def compat_table() -> str:
    """Return all defects as text, one per line: name, what the original does, its source, switch."""
    return "\n".join(f"{name:24} {case.original} [{case.spec}] {case.switch}".rstrip() for name, case in COMPAT.items())
