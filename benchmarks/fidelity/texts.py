"""Check of recorded token ids and labels.

If several projects use a template name, the template of ours whose ids fit the record best is compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.fidelity.folder import IMAGE_MARK, Line, Oracle, mismatches
from benchmarks.fidelity.original_rows import Reading, asked_row, counted_labels, readings, turns_of
from benchmarks.fidelity.published import CHATML_END, COUNTINGS, Counted, is_v0
from llava.chat_template import Segment
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.conversation import TEMPLATES
from llava.data.encode import Encoded, encode, tokenize_segments
from llava.errors import DataError
from llava.processing import LlavaMedProcessor
from llava.samples import from_row, with_placeholders
from llava.tokenization import token_id

PATCHES = ("<im_patch>", "<im_start>", "<im_end>")
CHATML = ("<|im_start|>", "<|im_end|>")
PAD_TOKEN = "[PAD]"
REFUSAL = "AssertionError"
"""Error of the originals for a row that they refuse."""

BYTE_LEVEL = "neox"
"""Name of the variants with a byte-level tokenizer."""

ASKING, RATE = "v1_sq", "@sq_r="
"""Template whose published system prompt is a file of the user here, and the mark of the share of asked questions."""

REPEATED = {"plain_qav": "plain"}
"""Templates that append a request and the image again to rows of another, by name."""

REQUEST = "has a request"
"""Key of a row that ended with the request of `REPEATED`."""

UNKNOWN = "no template of this package has that name"


def templates_of(name: str) -> list[str]:
    """Return our templates that a recorded name may mean."""
    return [key for key in TEMPLATES if key == name or key.endswith(f":{name}")]


def prompt_ids(text: str, processor: LlavaMedProcessor) -> list[int]:
    """Return the ids of a prompt in the notation of the originals."""
    ids = tokenize_segments([Segment(text, False, 0)], processor).ids
    return [IMAGE_MARK if token == processor.image_token_id else token for token in ids]


def text_processor(
    folder: Path, template: str, *, system: str | None = None, added: tuple[str, ...] = (), **settings: Any
) -> LlavaMedProcessor:
    """Return a text processor with the tokenizer of a folder and some added tokens, set to a template."""
    processor = _processor_of(folder, added, tuple(sorted({"num_image_tokens": 1, **settings}.items())))
    return processor.changed(template=template, system=system)


@cache
def _processor_of(folder: Path, added: tuple[str, ...], settings: tuple[tuple[str, Any], ...]) -> LlavaMedProcessor:
    # Made once, because reading a tokenizer takes longer than all rows of a template.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*added, *([] if "<im_patch>" in added else [IMAGE_TOKEN])], special_tokens=True)
    return LlavaMedProcessor(tokenizer, None, template="v1", **dict(settings))


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
    if not tree:
        raise ValueError(f"variant {'/'.join(path)} has no rows")
    first = next(iter(tree.values()))
    if "input_ids" not in first and "error" not in first:
        for name, below in tree.items():
            yield from variants(below, (*path, name))
        return
    named = dict(pair.split("=", 1) for pair in path[-1].split(",") if "=" in pair)
    yield Variant("/".join(path[:-1]) or path[-1], named.get("template", path[-1]), tree)


@dataclass(frozen=True, slots=True)
class RowResult:
    """Result of a row before it is known which defects may explain it.

    Attributes:
        names: `equal...` or names of `llava.compat`; empty if nothing explains the row.
        where: the variant and the row.
        num_values: number of compared values.
    """

    names: tuple[str, ...]
    where: str
    num_values: int = 1


@dataclass
class Tally:
    """Counts of the results of the rows of a recorded file, for ids or labels."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    num_values: int = 0

    def add(self, found: RowResult, allowed: frozenset[str]) -> None:
        """Count a row as `equal...`, as explained by names of `llava.compat`, or as wrong."""
        self.num_values += found.num_values
        if found.names and all(name.startswith("equal") or name in allowed for name in found.names):
            self.counts.update(found.names)
        else:
            self.wrong.append(f"{found.where} ({', '.join(found.names)})" if found.names else found.where)

    def line(self, quantity: str) -> Line:
        """Return the line of the report."""
        note = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        return mismatches(quantity, self.wrong, note, count=self.num_values)


def preprocessing(oracle: Oracle) -> Iterator[Line]:
    """Compare `preprocess.json`: ids and labels of every row with every template and tokenizer."""
    ids, labels = Tally(), Tally()
    for recorded in variants(oracle.json("preprocess.json")):
        name = recorded.template.partition("+")[0].partition("@")[0]
        variant = _without_request(recorded) if name in REPEATED else recorded
        name = REPEATED.get(name, name)
        if not templates_of(name):
            yield Line(f"preprocessing {variant.template}", None, "FAIL", UNKNOWN)
            continue
        best = _best(oracle, variant, name)
        for total, part in ((ids, best[0]), (labels, best[1])):
            total.counts += part.counts
            total.wrong += part.wrong
            total.num_values += part.num_values
    yield ids.line("token ids")
    yield labels.line("labels")


Fit = tuple[list[RowResult], list[RowResult]]
"""Results of the ids and of the labels of a variant, in one template with one counting."""

_KNOWN: dict[str, list[Fit]] = {}
"""Fits of variants by the digest of all that they depend on, so that a changed copy computes its change only."""


def _best(oracle: Oracle, variant: Variant, name: str) -> tuple[Tally, Tally]:
    """Return the results of the template and counting that fit a variant best."""
    content = json.dumps([variant.label, variant.rows, oracle.json("data.json")])
    key = hashlib.sha256(f"{oracle.path} {content}".encode()).hexdigest()
    if key not in _KNOWN:
        _KNOWN[key] = [fit for template in templates_of(name) for fit in _compare(oracle, variant, template)]
    tried = [(_tally(ids, oracle.compat), _tally(labels, oracle.compat)) for ids, labels in _KNOWN[key]]
    # Of equally wrong fits, that with more names tells which defect was not allowed.
    unexplained = [sum(not found.names for found in (*ids, *labels)) for ids, labels in _KNOWN[key]]
    ranks = [(len(ids.wrong) + len(labels.wrong), rest) for (ids, labels), rest in zip(tried, unexplained, strict=True)]
    return tried[ranks.index(min(ranks))]


def _without_request(variant: Variant) -> Variant:
    """Return a variant without the ids that all of its rows end with, if these hold an image and none is trained."""
    whole = [row for row in variant.rows.values() if "input_ids" in row]
    ends = zip(*(reversed(list(zip(row["input_ids"], row["labels"], strict=True))) for row in whole), strict=False)
    shared = takewhile(lambda pairs: len(set(pairs)) == 1 and pairs[0][1] == IGNORE_INDEX, ends)
    count = sum(1 for _ in shared)
    tails = [row["input_ids"][-count:] for row in whole] if count else []
    if not tails or any(IMAGE_MARK not in ids for ids in tails):
        return variant
    cut = {"input_ids", "labels"}
    rows = {
        name: {key: value[:-count] if key in cut else value for key, value in row.items()} | {REQUEST: True}
        for name, row in variant.rows.items()
    }
    return Variant(variant.name, variant.template, rows)


def _tally(results: Sequence[RowResult], allowed: frozenset[str]) -> Tally:
    """Return the counts of the results of rows that some names may explain."""
    counted = Tally()
    for found in results:
        counted.add(found, allowed)
    return counted


def _limits(oracle: Oracle, variant: Variant) -> dict[bool, int]:
    """Return the length of the longest recorded rows with and without images, which are cut differently."""
    found = {True: 0, False: 0}
    for row, recorded in variant.rows.items():
        kind = bool(oracle.rows[row].get("image"))
        found[kind] = max(found[kind], len(recorded.get("input_ids", ())))
    return found


def _compare(oracle: Oracle, variant: Variant, template: str) -> list[Fit]:
    """Compare the rows of a variant in a template, ids and labels, with the counting of each release."""
    processor = _processor(oracle, variant, template)
    limits, stated = _limits(oracle, variant), _stated_limit(oracle)
    legacy = "_nolegacy" not in variant.name and variant.name != BYTE_LEVEL
    ids: list[RowResult] = []
    labels: list[list[RowResult]] = [[] for _ in COUNTINGS]
    for row, recorded in variant.rows.items():
        where, source = f"{variant.label}/{row}", _source(oracle, variant, row)
        if "error" in recorded:
            ids.append(RowResult(("refused_rows",) if _refuses(source, processor, recorded) else (), where))
            continue
        theirs, limit = recorded["input_ids"], limits[bool(source.get("image"))]
        found = _explained(source, processor, theirs, limit)
        if found is None:
            ids.append(RowResult((), where, len(theirs)))
            continue
        reading, is_cut = found
        cut = f"equal, cut there at {len(theirs)}" if is_cut else "equal"
        more = ("image_request",) if recorded.get(REQUEST) else ()
        ids.append(RowResult((*reading.names, *more) or (cut,), where, len(theirs)))
        end = len(theirs) if is_cut else stated
        num_labels = len(recorded["labels"]) + ("mismatch_warning" in recorded)
        for counting, results in zip(COUNTINGS, labels, strict=True):
            counted = counted_labels(reading, theirs, processor, counting, legacy=legacy)
            how = _labels(counted, recorded, (source, processor, reading), end)
            results.append(RowResult(how, where, num_labels))
    return [(ids, results) for results in labels]


def _source(oracle: Oracle, variant: Variant, row: str) -> dict[str, Any]:
    """Return a row of the data, with the questions that the recorded seed asks."""
    rate = variant.template.partition(RATE)[2]
    return asked_row(oracle.rows[row], rate=float(rate), seed=variant.rows[row]["seed"]) if rate else oracle.rows[row]


def _stated_limit(oracle: Oracle) -> int | None:
    """Return the maximum length that the description of the folder states; None without one."""
    text = (oracle.path / "README.md").read_text(encoding="utf-8") if oracle.has("README.md") else ""
    stated = re.search(r"model_max_length (\d+)", text)
    return int(stated[1]) if stated else None


def _refuses(row: dict[str, Any], processor: LlavaMedProcessor, recorded: dict[str, Any]) -> bool:
    """Return whether an original raises this error for a row: in plain templates, and for roles in disorder."""
    turns = turns_of(row)
    if processor.template.drops_questions:
        is_refused = len(turns) != 2 or IMAGE_TOKEN not in turns[0].text
    else:
        roles = [turn.role for turn in turns[turns[0].role == "gpt" :]]
        is_refused = not is_v0(processor) and any(a == b for a, b in pairwise(roles))
    return is_refused and recorded["error"] == REFUSAL


def _explained(
    row: dict[str, Any], processor: LlavaMedProcessor, theirs: list[int], limit: int
) -> tuple[Reading, bool] | None:
    """Return the first reading of a row that gives the recorded ids, and whether they end early, at the limit."""
    fitting = [reading for reading in readings(row, processor) if reading.ids[: len(theirs)] == theirs]
    whole = next((reading for reading in fitting if len(reading.ids) == len(theirs)), None)
    if whole is not None:
        return whole, False
    return (fitting[0], True) if fitting and len(theirs) == limit else None


def _labels(
    counted: Counted,
    recorded: dict[str, Any],
    source: tuple[dict[str, Any], LlavaMedProcessor, Reading],
    limit: int | None,
) -> tuple[str, ...]:
    """Return the result of comparing recorded labels with ours; empty if they cannot be explained."""
    row, processor, reading = source
    theirs = recorded["labels"]
    warned = recorded.get("mismatch_warning")
    padding = _pad_id(processor)
    num_tokens = sum(token != padding for token in recorded["input_ids"])
    is_ignored = counted.is_mismatch(num_tokens, limit, recorded=bool(warned))
    if len(theirs) != len(recorded["input_ids"]) or (warned is not None and bool(warned) != is_ignored):
        return ()
    published = [IGNORE_INDEX] * len(theirs) if is_ignored else counted.labels
    is_ours = not reading.names and _trained(row, processor)[: len(theirs)] == theirs
    if is_ours and (theirs == published or not is_ignored):
        return ("equal",)
    if theirs != published:
        return ()
    if is_ignored or reading.names:
        return ("ignored_rows",) if is_ignored else reading.names
    if CHATML_END in processor.template.stops:
        return ("shifted_labels",)
    return ("trained_image_lead",) if _trains_leads(row, processor, theirs) else ("counted_labels",)


def _pad_id(processor: LlavaMedProcessor) -> int | None:
    padding = token_id(processor.tokenizer, PAD_TOKEN)
    found: int | None = processor.tokenizer.unk_token_id if padding is None else padding
    return found


def _trained(row: dict[str, Any], processor: LlavaMedProcessor) -> list[int]:
    """Return our labels of a row; none if we refuse it."""
    encoded = _encoded(row, processor)
    return [] if encoded is None else list(encoded.labels)


def _encoded(row: dict[str, Any], processor: LlavaMedProcessor) -> Encoded | None:
    try:
        sample = from_row(row)
        images = ["image"] * len(sample.images)
        return encode(with_placeholders(sample), processor, images=images, max_length=None)
    except DataError:
        return None


def _trains_leads(row: dict[str, Any], processor: LlavaMedProcessor, theirs: Sequence[int]) -> bool:
    """Return whether labels differ from ours only before the text of asked questions, where their images stand."""
    encoded = _encoded(row, processor)
    if encoded is None:
        return False
    first: dict[int, int] = {}
    for place, (label, turn) in enumerate(zip(encoded.labels, encoded.turns, strict=True)):
        if label != IGNORE_INDEX:
            first.setdefault(turn, place)
    shown = {encoded.turns[start] for start, _ in encoded.image_spans}
    return all(
        own == other or (turn in shown and place < first.get(turn, 0))
        for place, (own, other, turn) in enumerate(zip(encoded.labels, theirs, encoded.turns, strict=False))
    )


def _processor(oracle: Oracle, variant: Variant, template: str) -> LlavaMedProcessor:
    marked = "+im_start_end" in variant.template
    if _is_patched(variant):
        num = max(_longest_run(row["input_ids"]) for row in variant.rows.values() if "input_ids" in row)
        added = (PAD_TOKEN, *PATCHES) if "version=v0" in variant.name else PATCHES
        settings: dict[str, Any] = {"placement": "as_written", "use_im_start_end": True, "strip_around_images": True}
        return text_processor(oracle.language_models[0], template, added=added, num_image_tokens=num, **settings)
    system = None
    if template == ASKING:
        system = oracle.json("prompts.json")[ASKING]["prompt"].partition(" USER: ")[0]
    folder = (oracle.byte_tokenizers if variant.name == BYTE_LEVEL else oracle.language_models)[0]
    return text_processor(
        folder,
        template,
        system=system,
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
