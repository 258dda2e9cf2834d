"""`llava data deid DIR`: report identifying content of DICOM files and write de-identified copies.

    files --inspect_dataset--> report.json (names of fields, private fields, content of the pixel field, text in images)
          --clean_dataset, clean_pixels, --out--> PATIENT/STUDY/INSTANCE.dcm named by keys: same image, new identifiers

A copy keeps only what `deid_profile` lists. Files whose image may contain burned-in text are held back by default. Of
files that repeat an instance the first is copied, as in `llava data dicom`. Neither output nor report shows a value of
a field.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import SecondaryCaptureImageStorage

from llava.data.dicom.clean_pixels import (
    CleanPixels,
    check_copy,
    check_unused_bits,
    clean_pixel_field,
    put_pixels,
    trim_tables,
)
from llava.data.dicom.clean_streams import PixelsHeldBack
from llava.data.dicom.deid_profile import clean_dataset, fields_of, removed_texts
from llava.data.dicom.studies import IDENTITY_TAGS, NotDicom, RepeatedInstance, field_text, files_of
from llava.data.pseudonyms import key_of, read_salt
from llava.errors import ConfigError, DataError, LlavaError
from llava.imaging.decode import load_image, read_image_bytes
from llava.imaging.dicom.header import check_inflated, code_value, fill_syntax, silence, suppress_pydicom_output
from llava.imaging.dicom.policy import DicomPolicy
from llava.imaging.dicom.render import render_frames
from llava.imaging.dicom.sniff import is_dicom, may_be_bare
from llava.imaging.dicom.sop_classes import check_image_object
from llava.imaging.geometry import MAX_PIXELS
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.jsonl import write_atomic, write_json
from llava.utils.log import with_progress
from llava.utils.terminal import write_out

OFTEN_WRITTEN_ON = frozenset({"DOC", "ES", "GM", "IVUS", "OP", "OT", "SC", "SM", "US", "XC"})
"""Modalities whose images often contain burned-in names, dates and numbers."""

BAND = 1 / 40
"""Height of a line of text, as a fraction of the image height."""

BRIGHT, DARK = 0.75, 0.35
"""Fractions of the maximum: a stroke is above the first, the pixels on its sides are below the second."""

MAX_BRIGHT = 0.25
"""Maximum fraction of bright pixels in a row of text; a row with more is a bright area or noise."""

MIN_STROKES = 8
"""Minimum number of thin bright strokes in a band of text, about four letters."""


@dataclass(frozen=True, slots=True)
class DeidFindings:
    """Identifying content of one file.

    Attributes:
        fields: name of a field to its treatment (removed, emptied, replaced).
        num_private: number of private fields, including those in sequences.
        suspicions: reasons to suspect burned-in text or a recognizable person.
        in_pixels: other content of the pixel field and of lookup tables to its number of occurrences; removed.
    """

    fields: dict[str, str]
    num_private: int
    suspicions: tuple[str, ...]
    in_pixels: dict[str, int] = field(default_factory=dict)


def inspect_dataset(
    dataset: Dataset, image: Image.Image | None, *, later: Iterable[Image.Image] = (), is_item: bool = False
) -> DeidFindings:
    """Return the fields that a clean copy changes, and suspicions about the image.

    Args:
        dataset: all fields of a file.
        image: the image with its full range of values; None for items of sequences.
        later: its other frames.
        is_item: whether the fields are those of an item of a sequence.
    """
    fields: dict[str, str] = {}
    num_private = 0
    with silence:
        for tag, element, fate in fields_of(dataset, is_item=is_item):
            if tag.is_private:
                num_private += 1
            elif element is None or fate != "kept":
                fields[(element is not None and element.keyword) or str(tag)] = fate
            elif element.VR == "SQ":
                inner = [inspect_dataset(item, None, is_item=True) for item in element.value]
                num_private += sum(found.num_private for found in inner)
                fields.update(
                    {f"{element.keyword}.{name}": each for found in inner for name, each in found.fields.items()}
                )
    suspicions = find_suspicions(dataset, image)
    if (number := next((n for n, frame in enumerate(later, 1) if max_strokes(frame) >= MIN_STROKES), None)) is not None:
        suspicions.append(f"adjacent bright strokes, as in text, in frame {number}")
    return DeidFindings(fields, num_private, tuple(suspicions))


def find_suspicions(dataset: Dataset, image: Image.Image | None) -> list[str]:
    """Return the reasons to suspect that the image itself identifies the patient."""
    found = []
    burned_in = code_value(dataset, "BurnedInAnnotation")
    if burned_in == "YES":
        found.append("the header states that the image contains burned-in text")
    if code_value(dataset, "RecognizableVisualFeatures") == "YES":
        found.append("the header states that a person is recognizable")
    if burned_in != "NO":
        if code_value(dataset, "Modality") in OFTEN_WRITTEN_ON:
            found.append("images of this modality often contain text, and the header does not exclude it")
        with silence:
            image_type = str(dataset.get("ImageType", ""))
        is_capture = code_value(dataset, "SOPClassUID") == SecondaryCaptureImageStorage or "SCREEN" in image_type
        if is_capture or code_value(dataset, "ConversionType"):
            found.append("a scan or a screen capture, and the header does not exclude text")
    if image is not None and max_strokes(image) >= MIN_STROKES:
        found.append("adjacent bright strokes, as in text")
    return found


def max_strokes(image: Image.Image) -> int:
    """Return the maximum number of adjacent thin bright strokes in any band of rows.

    Text is drawn close to the maximum value, in strokes a few pixels wide with dark sides, and a line has many of them.
    """
    gray = np.asarray(image.convert("RGB"), dtype=np.int16).max(axis=2)
    counts = np.array([_num_strokes(row, int(gray.max())) for row in gray])
    height = max(8, round(len(gray) * BAND))
    bands = (np.sort(counts[top : top + height])[::-1] for top in range(0, len(counts), height // 2))
    # The fourth-largest count of a band: noise has strokes in single rows only.
    return max((int(band[3]) for band in bands if len(band) > 3), default=0)


def _num_strokes(row: NDArray[np.int16], largest: int) -> int:
    """Return the number of thin bright runs with dark sides in one row of an image."""
    bright = row >= max(BRIGHT * largest, 64)
    if bright.mean() > MAX_BRIGHT:
        return 0
    edges = np.flatnonzero(np.diff(np.concatenate(([0], bright.view(np.int8), [0]))))
    starts, ends = edges[::2], edges[1::2]
    inside = (starts > 2) & (ends < len(row) - 3) & (ends - starts <= max(4, len(row) // 150))
    starts, ends = starts[inside], ends[inside]
    left = np.minimum(row[starts - 2], row[starts - 3])
    right = np.minimum(row[ends + 1], row[ends + 2])
    return int(((left < DARK * largest) & (right < DARK * largest)).sum())


WHOLE_RANGE = DicomPolicy(window="full")
"""Full range of values: text has the maximum, which a window would also give to bright areas."""


HELD_BACK = "the image may contain burned-in text (pass --burned-in keep to write it)"


def read_dataset(data: bytes, name: str) -> pydicom.FileDataset:
    """Return all fields of a DICOM image file.

    Raises:
        DataError: the file is of another format, damaged, or not an image.
    """
    if not is_dicom(data) and not may_be_bare(data):
        raise NotDicom(f"image {name} is not a DICOM file")
    stream = io.BytesIO(data)
    with suppress_pydicom_output(f"image {name} cannot be read"):
        check_inflated(stream, name)
        dataset = pydicom.dcmread(stream, force=True)
        fill_syntax(dataset)
    check_image_object(dataset)
    return dataset


def clean_copy(dataset: pydicom.FileDataset, salt: bytes, cleaned: CleanPixels | None = None) -> tuple[str, bytes]:
    """Return path (made of keys) and content of a clean copy.

    Args:
        dataset: all fields of a file.
        salt: salt of the new identifiers.
        cleaned: its cleaned pixel field, which then also counts what lookup tables hold; default: cleaned here.

    Raises:
        DataError: the dataset cannot be written.
    """
    cleaned = cleaned or clean_pixel_field(dataset)
    with suppress_pydicom_output("cannot be written as a clean copy"):
        copy = clean_dataset(dataset, salt)
        put_pixels(copy, dataset, cleaned)
        trim_tables(copy, cleaned.found)
        copy.file_meta = FileMetaDataset()
        copy.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
        copy.file_meta.MediaStorageSOPClassUID = copy.SOPClassUID
        copy.file_meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID
        stream = io.BytesIO()
        pydicom.dcmwrite(stream, copy, enforce_file_format=True)
    parts = [key_of(kind, field_text(dataset, IDENTITY_TAGS[kind]), salt) for kind in ("patient", "study", "instance")]
    return f"{'/'.join(parts)}.dcm", stream.getvalue()


def process_file(path: str, args: Namespace, salt: bytes, *, written: Collection[str]) -> tuple[DeidFindings, str, str]:
    """Inspect one file and, with --out, write its clean copy.

    Args:
        path: path relative to the folder.
        args: options of the command.
        salt: salt of the new identifiers.
        written: paths of the copies that this run has already written.

    Returns:
        The findings, the path of the copy, which is empty without one, and the reason why the file is held back.

    Raises:
        DataError: the file cannot be used, or its copy would replace that of another file.
    """
    data = read_image_bytes(path, args.folder)
    try:
        dataset = read_dataset(data, path)
        frames = render_frames(data, WHOLE_RANGE, name=path, max_pixels=MAX_PIXELS)
        with suppress_pydicom_output("cannot be inspected"):
            findings = inspect_dataset(dataset, next(frames), later=frames)
        name, content, reason = _checked_copy(data, dataset, findings, salt)
        if args.out is None:
            return findings, "", ""
        if reason or (findings.suspicions and args.burned_in == "hold"):
            return findings, "", reason or HELD_BACK
        if name in written:
            raise RepeatedInstance("repeats an instance in this folder; only the first file is copied")
        write_atomic(args.out / name, content)
        if (args.out / name).read_bytes() != content:
            raise DataError(f"has a clean copy {name} that differs when read back; check the disk and remove the copy")
        return findings, name, ""
    except DataError as error:
        text = str(error).removeprefix("image given as bytes ").removeprefix(f"image {path} ")
        raise type(error)(f"image {path} {text}") from None


def _checked_copy(
    data: bytes, dataset: pydicom.FileDataset, findings: DeidFindings, salt: bytes
) -> tuple[str, bytes, str]:
    """Return path and content of a parsed and compared copy, or the reason to hold the file back.

    Also adds to `findings` what the pixel field holds.
    """
    try:
        cleaned = clean_pixel_field(dataset)
        findings.in_pixels.update(cleaned.found)
        check_unused_bits(dataset, cleaned.pixel_format)
        name, content = clean_copy(dataset, salt, cleaned)
        findings.in_pixels.update(cleaned.found)
        check_copy(dataset, read_dataset(content, name), cleaned, removed_texts(dataset))
        if load_image(content).tobytes() != load_image(data).tobytes():
            raise PixelsHeldBack("would look different as a clean copy")
    except PixelsHeldBack as error:
        return "", b"", f"the file {error}"
    return name, content, ""


def make_parser() -> Parser:
    """Return the parser of `llava data deid`."""
    parser = Parser(
        prog="llava data deid", description="Report identifying content of DICOM files, and write clean copies."
    )
    parser.add_argument("folder", type=Path, help="folder to search for DICOM files, including subfolders")
    parser.add_argument("--out", type=Path, help="folder for the clean copies; without it, files are only inspected")
    parser.add_argument(
        "--salt_file", help="file with the secret for new identifiers; created if missing; required with --out"
    )
    parser.add_argument("--report", type=Path, help="write the findings of each file as JSON to this file")
    parser.add_argument(
        "--burned_in",
        choices=["hold", "keep"],
        default="hold",
        help="treatment of files whose image may contain burned-in text",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data deid`."""
    args = make_parser().parse_args(argv)
    log.setup_logging()
    if args.out is not None and args.salt_file is None:
        raise ConfigError("--out requires --salt-file; without a secret the new identifiers could be reversed")
    if args.out is not None and args.out.resolve().is_relative_to(args.folder.resolve()):
        raise ConfigError(f"--out {args.out} lies inside {args.folder}; choose a folder outside of it")
    salt = b"" if args.salt_file is None else read_salt(args.salt_file)
    report: dict[str, dict[str, Any]] = {}
    written: set[str] = set()
    for path in with_progress(files_of(args.folder), title="inspecting", unit="file"):
        try:
            findings, name, reason = process_file(path, args, salt, written=written)
            written |= {name} - {""}
            report[path] = {**asdict(findings), "copy": name or None}
            if reason:
                report[path]["left_out"] = reason
        except LlavaError as error:
            report[path] = {"left_out": str(error)}
    if args.report is not None:
        write_json(args.report, report)
    write_out(_summary(report, copying=args.out is not None))


def _summary(report: Mapping[str, Mapping[str, Any]], *, copying: bool) -> str:
    read = [entry for entry in report.values() if "fields" in entry]
    fates = Counter((name, fate) for entry in read for name, fate in entry["fields"].items())
    reasons = Counter(reason for entry in read for reason in entry["suspicions"])
    in_pixels = Counter(name for entry in read for name in entry["in_pixels"])
    lines = [f"{len(read)} of {len(report)} files are readable images"]
    lines += [f"  {count:>8} {fate:<9}{name}" for (name, fate), count in sorted(fates.items())]
    lines += [f"  {sum(entry['num_private'] for entry in read):>8} private fields (removed)"]
    lines += [f"{sum(bool(entry['in_pixels']) for entry in read)} files hold more than pixels in the pixel field"]
    lines += [f"  {count:>8} removed  {name}" for name, count in sorted(in_pixels.items())]
    lines += [f"{sum(bool(entry['suspicions']) for entry in read)} files may contain burned-in text"]
    lines += [f"  {count:>8} {reason}" for reason, count in sorted(reasons.items())]
    if copying:
        held = Counter(entry["left_out"] for entry in read if "left_out" in entry)
        lines += [f"{sum(bool(entry.get('copy')) for entry in read)} clean copies written"]
        lines += [f"  {count:>8} files held back: {reason}" for reason, count in sorted(held.items())]
    if num_others := len(report) - len(read):
        lines += [f"{num_others} files left out: not DICOM, not an image, damaged or repeated (see --report)"]
    return "\n".join(lines) + "\n"
