"""Checks of recorded prompts, token ids and labels.

If several projects use a template name, the template of ours whose text (or ids) fits the record best is compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.fidelity.folder import IMAGE_MARK, Line, Oracle
from benchmarks.fidelity.published import counted_v0, is_shifted, is_v0
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.conversation import TEMPLATES, Segment
from llava.data.encode import encode, tokenize_segments
from llava.errors import DataError
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Turn, from_row, with_placeholders

PATCHES = ("<im_patch>", "<im_start>", "<im_end>")
CHATML = ("<|im_start|>", "<|im_end|>")
EXEMPLAR = "What are the key differences between renewable and non-renewable energy sources?"
"""First sentence of the long exemplar in some original prompts, which this package leaves out."""

NOT_BUILT = {
    "v1_sq": "self-questioning preprocessing is not built yet",
    "plain_qav": "a template of the self-questioning project, not built yet",
}
UNKNOWN = "no template of this package has that name"


def fitting(name: str) -> list[str]:
    """Return our templates that a recorded name may mean."""
    return [key for key in TEMPLATES if key == name or key.endswith(f":{name}")]


def prompts(oracle: Oracle) -> Iterator[Line]:
    """Compare `prompts.json`: text of a fixed exchange in every template, and recorded ids."""
    compared: Counter[str] = Counter()
    wrong, skipped, with_ids = [], [], []
    spoken = exchange(oracle.json("prompts.json").values())
    for name, recorded in oracle.json("prompts.json").items():
        if "prompt" not in recorded:
            compared["refused by the original"] += 1
            continue
        if name in NOT_BUILT:
            skipped.append(f"{name}: {NOT_BUILT[name]}")
            continue
        fits = [
            key
            for key in fitting(name)
            if TEMPLATES[key].published_prompt(spoken) == _without_exemplar(key, recorded, spoken)
        ]
        what = "equal" if fits else "different"
        if not fits and "bare_roles" in oracle.compat:
            fits = [key for key in fitting(name) if _with_bare_roles(key, recorded, spoken) == recorded["prompt"]]
            what = "bare_roles" if fits else what
        compared[what] += 1
        wrong += [] if fits else [name]
        if "input_ids" in recorded:
            with_ids.append((name, _ids_equal(oracle, recorded)))
    note = ", ".join(f"{count} {what}" for what, count in compared.items()) + _list("; differ", wrong)
    yield Line("prompts", float(len(wrong)), "FAIL" if wrong else "ok", note)
    if with_ids:
        bad = [name for name, equal in with_ids if not equal]
        yield Line("prompt ids", float(len(bad)), "FAIL" if bad else "ok", f"{len(with_ids)} prompts{_list(';', bad)}")
    for reason in skipped:
        yield Line("prompts", None, "skipped", reason)


def _list(head: str, names: list[str]) -> str:
    return f"{head} {', '.join(names[:8])}" if names else ""


def _with_bare_roles(template: str, recorded: dict[str, Any], spoken: Conversation) -> str:
    """Return our text without the mark before and the line end after each of the recorded roles."""
    text = TEMPLATES[template].published_prompt(spoken)
    for role in recorded["roles"]:
        text = text.replace(f"{CHATML[0]}{role}\n", role)
    return text


def exchange(records: Iterable[dict[str, Any]]) -> Conversation:
    """Return the conversation of all prompts, from a prompt with two separators.

    Raises:
        LookupError: no recorded prompt has two separators.
    """
    for recorded in records:
        if recorded.get("sep") != " " or not recorded.get("sep2"):
            continue
        human, gpt = recorded["roles"][:2]
        _, _, text = recorded["prompt"].partition(f" {human}: ")
        turns: list[Turn] = []
        for part in text.split(recorded["sep2"]):
            question, _, answer = part.strip().removeprefix(f"{human}: ").partition(f" {gpt}:")
            turns.append(Turn("human", question))
            turns += [Turn("gpt", answer.removeprefix(" "))] if answer else []
        return Conversation(tuple(turns))
    raise LookupError("no recorded prompt has two separators, which are needed to find its turns")


def _without_exemplar(template: str, recorded: dict[str, Any], spoken: Conversation) -> str:
    """Return the recorded prompt without the exemplar, with images wrapped as in our template."""
    wrap = TEMPLATES[template].image_wrap
    wrapped = recorded["prompt"].replace(IMAGE_TOKEN, IMAGE_TOKEN.join(wrap))
    if EXEMPLAR not in wrapped:
        return str(wrapped)
    first = spoken.turns[0].text.replace(IMAGE_TOKEN, IMAGE_TOKEN.join(wrap))
    return str(TEMPLATES[template].system + wrapped[wrapped.rindex(f"###{recorded['roles'][0]}: {first}###") :])


def _ids_equal(oracle: Oracle, recorded: dict[str, Any]) -> bool:
    processor = text_processor((oracle.language_models or oracle.models)[0], "v1")
    return prompt_ids(recorded["prompt"], processor) == recorded["input_ids"]


def prompt_ids(text: str, processor: LlavaMedProcessor) -> list[int]:
    """Return the ids of a prompt in the notation of the originals."""
    ids = tokenize_segments([Segment(text, False, 0)], processor).ids
    return [IMAGE_MARK if token == processor.image_token_id else token for token in ids]


def text_processor(folder: Path, template: str, *, added: tuple[str, ...] = (), **settings: Any) -> LlavaMedProcessor:
    """Return a text processor with the tokenizer of a folder and some added tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*added, *([] if "<im_patch>" in added else [IMAGE_TOKEN])], special_tokens=True)
    return LlavaMedProcessor(tokenizer, None, **{"template": template, "num_image_tokens": 1, **settings})


@dataclass(frozen=True)
class Variant:
    """Recorded preprocessing: tokenizer and settings, name of the template, and rows by id."""

    name: str
    template: str
    rows: dict[str, dict[str, Any]]

    @property
    def label(self) -> str:
        """Full name of the variant."""
        return f"{self.name}/{self.template}"


def variants(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Variant]:
    """Yield the recorded variants at any depth of the tree."""
    first = next(iter(tree.values()))
    if "input_ids" not in first and "error" not in first:
        for name, below in tree.items():
            yield from variants(below, (*path, name))
        return
    named = dict(pair.split("=", 1) for pair in path[-1].split(",") if "=" in pair)
    yield Variant("/".join(path[:-1]) or path[-1], named.get("template", path[-1]), tree)


@dataclass
class Tally:
    """Counts of the results of the rows of a recorded file, for ids or labels."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str | None, where: str, allowed: frozenset[str]) -> None:
        """Count a row as `equal...`, as explained by a name of `llava.compat`, or as wrong."""
        if what is not None and (what.startswith("equal") or what in allowed):
            self.counts[what] += 1
        else:
            self.wrong.append(f"{where} ({what})" if what else where)

    def line(self, quantity: str) -> Line:
        """Return the line of the report."""
        note = ", ".join(f"{count} {what}" for what, count in self.counts.items()) + _list("; differ", self.wrong)
        return Line(quantity, float(len(self.wrong)), "FAIL" if self.wrong else "ok", note)


def preprocessing(oracle: Oracle) -> Iterator[Line]:
    """Compare `preprocess.json`: ids and labels of every row with every template and tokenizer."""
    ids, labels = Tally(), Tally()
    limits = _limits(oracle, list(variants(oracle.json("preprocess.json"))))
    for variant in variants(oracle.json("preprocess.json")):
        name = variant.template.partition("+")[0].partition("@")[0]
        if name in NOT_BUILT:
            yield Line(f"preprocessing {variant.template}", None, "skipped", NOT_BUILT[name])
            continue
        if not fitting(name):
            yield Line(f"preprocessing {variant.template}", None, "FAIL", UNKNOWN)
            continue
        tried = [_compare(oracle, variant, key, limits) for key in fitting(name)]
        best = min(tried, key=lambda each: len(each[0].wrong) + len(each[1].wrong))
        for total, part in ((ids, best[0]), (labels, best[1])):
            total.counts += part.counts
            total.wrong += part.wrong
    yield ids.line("token ids")
    yield labels.line("labels")


def _limits(oracle: Oracle, found_variants: Sequence[Variant]) -> dict[bool, int]:
    """Return the length of the longest recorded rows with and without images, which are cut differently."""
    found = {True: 0, False: 0}
    for variant in found_variants:
        for row, recorded in variant.rows.items():
            kind = bool(oracle.rows[row].get("image"))
            found[kind] = max(found[kind], len(recorded.get("input_ids", ())))
    return found


def _compare(oracle: Oracle, variant: Variant, template: str, limits: dict[bool, int]) -> tuple[Tally, Tally]:
    """Compare the rows of a variant in a template; a row may end early only where the longest ones end."""
    processor = _processor(oracle, variant, template)
    ids, labels = Tally(), Tally()
    for row, recorded in variant.rows.items():
        where = f"{variant.label}/{row}"
        if "error" in recorded:
            ids.add("refused_rows", where, oracle.compat)
            continue
        sample = from_row(oracle.rows[row])
        if is_v0(processor) and len(oracle.rows[row]["conversations"]) > len(sample.conversation.turns):
            ids.add("first_answer", where, oracle.compat)
            continue
        mine = _encoded(sample, processor)
        length = len(recorded["input_ids"])
        fits = mine is not None and mine[0][:length] == recorded["input_ids"]
        if mine is None or not fits or (len(mine[0]) > length != limits[bool(sample.images)]):
            how = None if mine is None else _other_ids(mine[0], recorded["input_ids"], sample, processor)
            ids.add(how, where, oracle.compat)
            if how == "spelled_end_marks":  # the original count of labels drifts there or fails
                labels.add("ignored_rows" if _is_ignored(recorded) else how, where, oracle.compat)
            continue
        ids.add("equal" if len(mine[0]) == length else f"equal, cut there at {length}", where, oracle.compat)
        ours, trained = mine[0][:length], mine[1][:length]
        labels.add(_labels(ours, trained, recorded, (sample.conversation, processor)), where, oracle.compat)
    return ids, labels


def _other_ids(ours: list[int], theirs: list[int], sample: Any, processor: LlavaMedProcessor) -> str | None:
    """Return the name in `llava.compat` that explains ids different from ours; None without one."""
    mine, recorded = _spelled(ours, processor), _spelled(theirs, processor)
    is_cut = mine.startswith(recorded) and str(processor.tokenizer.eos_token) in recorded and not sample.images
    end = processor.eos_token_id
    if (mine == recorded or is_cut) and ours[: len(theirs)].count(end) > theirs.count(end):
        return "spelled_end_marks"
    if processor.use_im_start_end:
        processor.use_im_start_end = False
        without = _encoded(sample, processor)
        processor.use_im_start_end = True
        if without is not None and without[0] == theirs:
            return "dropped_markers"
    return None


def _labels(
    ours: list[int], trained: list[int], recorded: dict[str, Any], source: tuple[Conversation, LlavaMedProcessor]
) -> str | None:
    """Return the result of comparing recorded labels with ours; None if they cannot be explained."""
    theirs = recorded["labels"]
    if trained == theirs:
        return "equal"
    if is_v0(source[1]):
        return "counted_labels" if counted_v0(ours, *source) == theirs else None
    if _is_ignored(recorded):
        return "ignored_rows"
    if "<|im_end|>" in source[1].template.stops and is_shifted(trained, theirs):
        return "shifted_labels"
    return None


def _is_ignored(recorded: dict[str, Any]) -> bool:
    """Return whether the original warned about a row and trained no token of it."""
    return bool(recorded.get("mismatch_warning")) and set(recorded["labels"]) == {IGNORE_INDEX}


def _encoded(sample: Any, processor: LlavaMedProcessor) -> tuple[list[int], list[int]] | None:
    """Return ids in the notation of the originals, and labels."""
    try:
        encoded = encode(with_placeholders(sample), processor, images=["image"] * len(sample.images), max_length=None)
    except DataError:
        return None
    placed = processor.image_token_id if processor.num_image_tokens == 1 else None
    return [IMAGE_MARK if token == placed else token for token in encoded.input_ids], list(encoded.labels)


def _spelled(ids: list[int], processor: LlavaMedProcessor) -> str:
    """Return the text of ids without white space, with special tokens as text."""
    pieces = [processor.tokenizer.decode([token]) for token in ids if token >= 0]
    return "".join("".join(pieces).split())


def _processor(oracle: Oracle, variant: Variant, template: str) -> LlavaMedProcessor:
    marked = "+im_start_end" in variant.template
    if _is_patched(variant):
        num = max(_longest_run(row["input_ids"]) for row in variant.rows.values() if "input_ids" in row)
        added = ("[PAD]", *PATCHES) if "version=v0" in variant.name else PATCHES
        settings = {"placement": "as_written", "use_im_start_end": True, "strip_around_images": True}
        return text_processor(oracle.language_models[0], template, added=added, num_image_tokens=num, **settings)
    folder = (oracle.byte_tokenizers if variant.name == "neox" else oracle.language_models)[0]
    return text_processor(
        folder,
        template,
        added=CHATML if variant.name.endswith("_chatml") else (),
        prefix_mark="text" if "_nolegacy" in variant.name else None,
        use_im_start_end=marked,
    )


def _is_patched(variant: Variant) -> bool:
    """Return whether images were written as patch tokens, without a placeholder in the ids."""
    return variant.name.startswith("version=")


def _longest_run(ids: list[int]) -> int:
    """Return the length of the longest run of one id."""
    longest = length = 1
    for before, token in pairwise(ids):
        length = length + 1 if token == before else 1
        longest = max(longest, length)
    return longest
