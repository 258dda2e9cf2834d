"""Show one row of a data file as the model sees it: text, trained tokens, images and truncation.

row --render, tokenize--> tokens --stretches of one kind--> terminal text, or an HTML page
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from llava.constants import IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN, PROCESSOR_FILE
from llava.data.encode import kept_tokens, place_images, tokenize_segments
from llava.data.records import read_default, sample_of
from llava.data.self_questioning import QuestionDraws
from llava.errors import CheckpointError, DataError
from llava.imaging.anyres import Size
from llava.imaging.decode import load_image
from llava.imaging.dicom.policy import DicomPolicy
from llava.processing import LlavaMedProcessor
from llava.samples import Origin, Sample, sample_label, with_placeholders
from llava.tokenization import read_tokenizer
from llava.utils.faults import start_of
from llava.utils.json_rows import read_rows
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import image_url, render_page
from llava.utils.terminal import visible, visible_lines, write_out

KINDS = ("text", "trained", "image")
"""Kinds of tokens; each may also be cut."""

COLORS = {"text": "", "trained": "\x1b[1;32m", "image": "\x1b[1;34m", "cut": "\x1b[9;31m"}
"""Terminal colors: green is trained, blue is an image, struck-through red was truncated."""

MARKS = {"text": ("", ""), "trained": ("[[", "]]"), "image": ("<", ">"), "cut": ("{{", "}}")}
"""Marks that replace the colors in plain text."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive tokens of one kind.

    Attributes:
        kind: one of `KINDS`.
        cut: whether truncation removed the tokens.
        start: index of the first token, before truncation.
        ids: token ids.
        text: text of the tokens.
        turn: turn of the first token, -1 for the system text.
    """

    kind: str
    cut: bool
    start: int
    ids: tuple[int, ...]
    text: str
    turn: int


@dataclass(frozen=True, slots=True)
class RowView:
    """Row prepared for display: a title, the settings, and the stretches in order."""

    title: str
    settings: str
    stretches: tuple[Stretch, ...]

    def count(self, kind: str, *, cut: bool = False) -> int:
        """Return the number of tokens of a kind that were kept, or cut."""
        return sum(len(s.ids) for s in self.stretches if s.kind == kind and s.cut == cut)

    def summary(self) -> str:
        """Return the token counts as one line."""
        kept = {kind: self.count(kind) for kind in KINDS}
        num_cut = sum(self.count(kind, cut=True) for kind in KINDS)
        lost = f", {self.count('trained', cut=True)} of them trained" if num_cut else ""
        return (
            f"{sum(kept.values())} tokens: {kept['trained']} trained, {kept['image']} of images, "
            f"{kept['text']} other; truncation cut {num_cut}{lost}"
        )


def make_view(
    sample: Sample, processor: LlavaMedProcessor, *, max_length: int | None, sizes: Sequence[Size] | None = None
) -> RowView:
    """Return the view of a sample as training would encode it; `sizes` as for `encode`.

    Raises:
        DataError: the sample cannot be encoded.
    """
    segments = processor.template.render(place_images(with_placeholders(sample), processor))
    draft = tokenize_segments(segments, processor, sizes)
    text = "".join(segment.text for segment in segments)
    kept = set(kept_tokens(draft, max_length))
    states: list[tuple[str, bool, int]] = []
    for t, trained in enumerate(draft.trained):
        image = next((n for n, (start, stop) in enumerate(draft.image_spans) if start <= t < stop), -1)
        kind = "image" if image >= 0 else "trained" if trained else "text"
        states.append((kind, t not in kept, image))
    stretches: list[Stretch] = []
    groups = [[t for t, _ in group] for _, group in groupby(enumerate(states), key=lambda item: item[1])]
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        kind, cut, image = states[group[0]]
        stop = len(text) if after is None else draft.characters[after[0]][0]
        shown = f"image {image + 1}" if image >= 0 else text[draft.characters[group[0]][0] : stop]
        ids = tuple(draft.ids[t] for t in group)
        stretches.append(Stretch(kind, cut, group[0], ids, shown, draft.turns[group[0]]))
    limit = "no limit" if max_length is None else f"at most {max_length} tokens"
    settings = f"template {processor.template.name}, images {processor.placement}, {limit}"
    return RowView(sample_label(sample), settings, tuple(stretches))


def to_terminal(view: RowView, processor: LlavaMedProcessor, *, color: bool) -> str:
    """Return the view as text; without `color`, marks surround the parts that would be colored."""
    legend = [_paint(name, name, color=color) for name in ("trained", "image", "cut")]
    lines = [visible(view.title), view.settings, view.summary(), "marked: " + ", ".join(legend), ""]
    shown = (_paint(visible_lines(stretch.text), *_names(stretch), color=color) for stretch in view.stretches)
    lines += ["".join(shown), ""]
    for stretch in view.stretches:
        names = " ".join(_names(stretch)) + (f" turn {stretch.turn}" if stretch.turn >= 0 else " system")
        lines.append(f"{stretch.start:>6}..{stretch.start + len(stretch.ids):<6}{names}: {_ids(stretch, processor)}")
    return "\n".join(lines) + "\n"


def to_html(view: RowView, processor: LlavaMedProcessor, image_urls: Sequence[str] = ()) -> str:
    """Return the view as an HTML page; `image_urls` are `data:` URLs of the images."""
    parts = [
        {
            "kind": " ".join(_names(stretch)),
            "text": stretch.text,
            "range": f"{stretch.start} to {stretch.start + len(stretch.ids)}",
            "turn": "system" if stretch.turn < 0 else stretch.turn,
            "tokens": _ids(stretch, processor),
        }
        for stretch in view.stretches
    ]
    return render_page(
        "row.html", title=view.title, settings=view.settings, summary=view.summary(), images=image_urls, parts=parts
    )


def _names(stretch: Stretch) -> tuple[str, ...]:
    return (stretch.kind, "cut") if stretch.cut else (stretch.kind,)


def _paint(text: str, *names: str, color: bool) -> str:
    """Return text in its colors, or between its marks."""
    for name in names:
        before, after = (COLORS[name], "\x1b[0m" if COLORS[name] else "") if color else MARKS[name]
        text = f"{before}{text}{after}"
    return text


def _ids(stretch: Stretch, processor: LlavaMedProcessor) -> str:
    """Return ids with their tokens; an image as its id and the number of repetitions."""
    if stretch.kind == "image":
        return f"{stretch.ids[0]} x {len(stretch.ids)}"
    tokens = processor.tokenizer.convert_ids_to_tokens(list(stretch.ids))
    return " ".join(f"{visible(str(token))}={index}" for token, index in zip(tokens, stretch.ids, strict=True))


def _image_urls(sample: Sample, folder: str | None, dicom: DicomPolicy) -> list[str]:
    """Return the images of the row as `data:` URLs, scaled down for the page; empty without a folder."""
    if folder is None:
        return []
    return [image_url(load_image(ref, folder, dicom=dicom), side=336, form="png") for ref in sample.images]


def _sizes(sample: Sample, processor: LlavaMedProcessor, folder: str | None) -> list[Size] | None:
    """Return the sizes of the images of the row where the number of tokens depends on them, else None.

    Raises:
        DataError: the sizes are needed and no folder is given.
    """
    if not processor.has_variable_images or not sample.images:
        return None
    if folder is None:
        mode = processor.image_mode
        raise DataError(f"image mode {mode} needs the images to count the tokens of the row; set --image-folder")
    return [load_image(ref, folder, dicom=processor.dicom).size for ref in sample.images]


def load_processor(model: str, args: Any) -> LlavaMedProcessor:
    """Return the processor of a trained model, or one of a language model's tokenizer and the flags.

    Raises:
        CheckpointError: the tokenizer of the model cannot be loaded.
    """
    if (Path(model) / PROCESSOR_FILE).is_file():
        return LlavaMedProcessor.from_pretrained(model)
    try:
        tokenizer = read_tokenizer(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{model} has neither a processor ({PROCESSOR_FILE}) nor a tokenizer that can be loaded: {start_of(error)}"
        ) from error
    markers = [IM_START_TOKEN, IM_END_TOKEN] if args.mm_use_im_start_end else []
    tokenizer.add_tokens([IMAGE_TOKEN, *markers], special_tokens=True)
    return LlavaMedProcessor(
        tokenizer,
        None,
        template=args.version,
        num_image_tokens=args.num_image_tokens,
        use_im_start_end=args.mm_use_im_start_end,
    )


def load_row(file: str, number: int) -> Sample:
    """Return one row of a data file; other rows may be unusable, but not the file.

    Raises:
        DataError: the file is broken or does not have this row, or the row cannot be used.
    """
    num_rows, found = 0, None
    for row, value in read_rows(file):
        num_rows += 1
        found = value if row == number else found
    if not 0 <= number < num_rows:
        raise DataError(f"{file} has {num_rows} rows, so --row must be from 0 to {num_rows - 1}, got {number}")
    try:
        return sample_of(found, Origin(file, number), read_default)[0]
    except DataError as error:
        raise DataError(f"{file}, row {number}: {error}") from error


def show(args: Namespace) -> None:
    """Print a row of a data file, and write its page if the options name one.

    Args:
        args: options of `llava.data.show_command`.

    Raises:
        LlavaError: the file, the row or the model cannot be used.
    """
    processor = load_processor(args.model, args)
    sample = load_row(args.file, args.row)
    draws = None if args.sq_r is None else QuestionDraws(args.sq_r, seed=args.seed).fitting(processor.template)
    if draws is not None:
        place, has_image = f"{args.epoch}/{args.row}", bool(sample.images)
        conversation = draws.apply(sample.conversation, has_image=has_image, place=place)
        sample = replace(sample, conversation=conversation)
    try:
        sizes = _sizes(sample, processor, args.image_folder)
        view = make_view(sample, processor, max_length=args.max_length, sizes=sizes)
    except DataError as error:
        raise error if sample_label(sample) in str(error) else DataError(f"{sample_label(sample)}: {error}") from error
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    sys.stdout.write(to_terminal(view, processor, color=color))
    if args.html:
        write_atomic(args.html, to_html(view, processor, _image_urls(sample, args.image_folder, processor.dicom)))
        write_out(f"page: {args.html}\n")
