"""Findings of chest X-rays in the terminal (`llava findings`).

    llava findings xray.dcm other.png --model microsoft/llava-rad --model-base lmsys/vicuna-7b-v1.5 --labels

    image files --decode, header of DICOM--> prompt of the training --engine, all images at once--> findings
                                                                                      --rules--> 14 findings (--labels)

Images are read before the model is loaded. What the model was not trained for is named in one warning for each kind.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.conversation import TEMPLATES, ConversationTemplate, get_template
from llava.data.report_rows import is_frontal, report_question
from llava.errors import DataError, GenerationError
from llava.generation.options import (
    IMAGE_HELP,
    MODEL_HELP,
    MORE_MODEL_HELP,
    add_engine_options,
    local_engine_of,
    saved_template,
)
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.imaging.decode import load_image, read_image_bytes, stored_format
from llava.report_labels.labeler import label_report
from llava.samples import Conversation, Turn
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.terminal import visible, write_out

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
"""Default limit of the findings, that of the published evaluation."""

NOTICE = "research use, not for diagnosis"
TEMPLATE = "v1"
"""Template that LLaVA-Rad was trained with."""

MAX_CUT = 0.15
"""Largest share of an image that the center crop may cut without a warning."""

XRAY = frozenset({"CR", "DX", "DR", "RG"})
"""DICOM modalities of radiographs."""

HEADER_TAGS = ("Modality", "ViewPosition")


@dataclass(frozen=True, slots=True)
class Radiograph:
    """Image file of the command line.

    Attributes:
        name: path as given.
        data: bytes of the file.
        size: width and height of the image in pixels.
        view: why the image is not a frontal radiograph, from its DICOM header; empty if nothing says so.
    """

    name: str
    data: bytes
    size: tuple[int, int]
    view: str


def read_radiograph(path: str) -> Radiograph:
    """Return an image file, decoded once to report errors before a model is loaded.

    Raises:
        DataError: the file is missing or cannot be decoded; names it.
    """
    data = read_image_bytes(path, None)
    try:
        size = load_image(data).size
    except DataError as error:
        raise type(error)(str(error).replace("given as bytes", path, 1)) from error
    return Radiograph(path, data, size, other_view(data, path) if stored_format(data) == "DICOM" else "")


def other_view(data: bytes, name: str) -> str:
    """Return what a DICOM header states instead of a frontal radiograph; empty if it states nothing else."""
    from llava.imaging.dicom.header import code_value, read_header  # pydicom is slow to import

    dataset = read_header(data, HEADER_TAGS, name=name, pixels=False)
    modality, view = code_value(dataset, "Modality"), code_value(dataset, "ViewPosition")
    if modality and modality not in XRAY:
        return f"modality {modality}"
    return f"view {view}" if view and not is_frontal(view) else ""


def findings_prompt(image: Radiograph, reason: str | None) -> Prompt:
    """Return the question that the model was trained with."""
    question = report_question("findings", reason)
    return Prompt(Conversation((Turn("human", f"{IMAGE_TOKEN}\n{question}"),)), (image.data,))


def is_template(template: ConversationTemplate, name: str) -> bool:
    """Return whether a template produces the same text as the one of the given name."""
    if template.name == name or name not in TEMPLATES:
        return template.name == name
    other = get_template(name)
    return replace(template, name=name, trains_empty=other.trains_empty) == other


def template_warning(template: ConversationTemplate, saved: str | None) -> str:
    """Return what to say about the template of a prompt; empty if it is that of LLaVA-Rad.

    Args:
        template: template of the prompt.
        saved: name of the template that the checkpoint states, if any.
    """
    name = template.name
    if saved is not None and not is_template(template, saved):
        return f"the template is {name}; the model was trained with {saved}. Remove --conv-mode."
    if is_template(template, TEMPLATE):
        return ""
    if saved is not None:
        return f"the model was trained with the template {saved}, not with {TEMPLATE} as LLaVA-Rad"
    return (
        f"the checkpoint names no template, and {name} is used; LLaVA-Rad was trained with {TEMPLATE}. "
        f"For a LLaVA-Rad model, pass --conv-mode {TEMPLATE}."
    )


def warn_about(images: Sequence[Radiograph], processor: Any, saved: str | None) -> None:
    """Log one warning for each kind of difference to the training: views, cut borders, template.

    Args:
        images: images of the command line.
        processor: processor of the model.
        saved: name of the template that the checkpoint states, if any.
    """
    from llava.imaging.image_processor import cut_share  # loads torch

    views = [f"{image.name} ({image.view})" for image in images if image.view]
    if views:
        logger.warning(
            "%s: not frontal X-rays (AP or PA) by the DICOM header; the model was trained with these only",
            ", ".join(views),
        )
    shares = [(image.name, cut_share(processor, image.size)) for image in images]
    cut = [f"{name} ({100 * share:.0f} %)" for name, share in shares if share > MAX_CUT]
    if cut:
        logger.warning("%s: cut by the center crop; findings there are not seen", ", ".join(cut))
    if warning := template_warning(processor.template, saved):
        logger.warning(warning)


def findings_row(name: str, completion: Completion, *, labels: bool) -> dict[str, Any]:
    """Return the JSON row of an image: its findings, or the error."""
    row = {
        "image": name,
        "findings": completion.text.strip(),
        "num_new_tokens": len(completion.token_ids),
        "stop_reason": completion.finish,
    }
    if completion.finish == "error":
        return {**row, "findings": "", "error": completion.error or "the engine gave no reason"}
    return {**row, **label_report(str(row["findings"])).to_json()} if labels else row


def findings_text(row: dict[str, Any], *, is_named: bool) -> str:
    """Return the lines of a row: its name if there are several, the findings, and the labels by value."""
    lines = [visible(row["image"])] if is_named else []
    lines.append(f"error: {row['error']}" if "error" in row else row["findings"])
    if "labels" in row:
        for value, word in ((1, "stated"), (-1, "uncertain"), (0, "denied")):
            names = [name for name, label in row["labels"].items() if label == value]
            lines.append(f"  {word}: {', '.join(names) or '-'}")
    return "\n".join(lines) + "\n"


FIRST_HELP = {"model": MODEL_HELP, "findings": ("--reason", "--labels", "--json", "--max-new-tokens")}
"""Options that `llava findings --help` shows."""

MORE_HELP = {"model": MORE_MODEL_HELP, "images": IMAGE_HELP}
"""Options that `llava findings --help all` shows too."""


def make_parser() -> Parser:
    """Return the argument parser of `llava findings`."""
    parser = Parser(
        prog="llava findings",
        description=f"Write the findings of chest X-rays ({NOTICE}).",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG, JPEG or DICOM files of 8 to 16 bits")
    add_engine_options(parser)
    parser.add_argument("--reason", help="reason for the examination, which becomes part of the question")
    parser.add_switch("--labels", help="also write the rule labels of the text (14 findings; not CheXbert)")
    parser.add_switch("--json", help="JSON lines: image, findings, num_new_tokens, stop_reason, and labels")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="limit of the findings in tokens")
    parser.show_first(FIRST_HELP, MORE_HELP)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava findings`.

    Raises:
        GenerationError: an image has no findings; the others are written.
    """
    args = make_parser().parse_args(argv)
    log.setup_logging()
    images = [read_radiograph(path) for path in args.images]
    sampling = Sampling(max_new_tokens=args.max_new_tokens)
    sys.stderr.write(f"llava findings: {NOTICE}\n")
    engine = local_engine_of(args)
    warn_about(images, engine.processor, saved_template(args.model))
    answers = engine.generate([findings_prompt(image, args.reason) for image in images], sampling)
    rows = [
        findings_row(image.name, answer, labels=args.labels)
        for image, [answer, *_] in zip(images, answers, strict=True)
    ]
    for number, row in enumerate(rows):
        if args.json:
            write_out(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            write_out("\n" * (number > 0) + findings_text(row, is_named=len(rows) > 1))
    cut = [row["image"] for row in rows if row["stop_reason"] == "length"]
    if cut:
        logger.warning("%s: cut at --max-new-tokens %d", ", ".join(cut), args.max_new_tokens)
    failed = [row["image"] for row in rows if "error" in row]
    if failed:
        raise GenerationError(f"no findings for {', '.join(failed)}; the output has the reason instead")
