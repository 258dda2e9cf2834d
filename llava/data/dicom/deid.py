"""`llava data deid DIR`: what in DICOM files may tell whose they are, and clean copies of them.

    files --inspect--> report.json (names of fields, private fields, writing in pictures)
          --clean, --out--> PATIENT/STUDY/INSTANCE.dcm of keys: pixels as they were, identifiers new

A copy keeps only what `deid_profile` lists. Files whose picture may bear writing are held back unless asked for: no
field says what is written there. Of files that repeat an instance the first is copied, as `llava data dicom` takes it.
Nothing that a field holds is printed or put into the report.
"""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import SecondaryCaptureImageStorage

from llava.data.dicom.deid_profile import clean_dataset, fields_of
from llava.data.dicom.pseudonyms import key_of, read_salt
from llava.data.dicom.studies import IDENTITY_TAGS, NotDicom, RepeatedInstance, field_text, files_of
from llava.errors import ConfigError, DataError, LlavaError
from llava.imaging.decode import load, read_bytes
from llava.imaging.dicom.header import check_inflated, fill_syntax, quiet, silence, word
from llava.imaging.dicom.policy import DicomPolicy
from llava.imaging.dicom.sniff import is_dicom, may_be_bare
from llava.imaging.dicom.sop_classes import check_picture
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.jsonl import write_atomic, write_json
from llava.utils.log import progress

OFTEN_WRITTEN_ON = frozenset({"DOC", "ES", "GM", "IVUS", "OP", "OT", "SC", "SM", "US", "XC"})
"""Modalities whose pictures often bear names, dates and numbers."""

BAND = 1 / 40
"""Height of a line of writing, as a share of the picture's."""

BRIGHT, DARK = 0.75, 0.35
"""Shares of the largest value above which a stroke and below which its sides lie."""

MAX_BRIGHT = 0.25
"""Share of bright pixels in a row above which it is no line of writing on a dark ground, but a bright part or noise."""

MIN_STROKES = 8
"""Thin bright strokes in one band from which on it is taken for writing: some four letters."""


@dataclass(frozen=True, slots=True)
class DeidFindings:
    """What was found in one file.

    Attributes:
        fields: name of a field to what happens to it (removed, emptied, replaced).
        num_private: private fields, also inside sequences.
        suspicions: reasons to think that something is written in the picture.
    """

    fields: dict[str, str]
    num_private: int
    suspicions: tuple[str, ...]


def inspect_dataset(dataset: Dataset, picture: Image.Image | None) -> DeidFindings:
    """Return what a file holds that does not stay as it is.

    Args:
        dataset: all its fields.
        picture: shown from its smallest to its largest value; None where it cannot be decoded.
    """
    fields: dict[str, str] = {}
    num_private = 0
    with silence:
        for tag, element, fate in fields_of(dataset):
            if tag.is_private:
                num_private += 1
            elif element is None or fate != "kept":
                fields[(element is not None and element.keyword) or str(tag)] = fate
            elif element.VR == "SQ":
                inner = [inspect_dataset(item, None) for item in element.value]
                num_private += sum(found.num_private for found in inner)
                fields.update(
                    {f"{element.keyword}.{name}": each for found in inner for name, each in found.fields.items()}
                )
    return DeidFindings(fields, num_private, tuple(find_suspicions(dataset, picture)))


def find_suspicions(dataset: Dataset, picture: Image.Image | None) -> list[str]:
    """Return the reasons to think that the picture itself tells whose it is; none where the header says it does not."""
    found = []
    said = word(dataset, "BurnedInAnnotation")
    if said == "YES":
        found.append("the header says that something is written in the picture")
    if word(dataset, "RecognizableVisualFeatures") == "YES":
        found.append("the header says that somebody can be recognised")
    if said != "NO":
        if word(dataset, "Modality") in OFTEN_WRITTEN_ON:
            found.append("pictures of this modality often bear writing, and the header does not deny it")
        with silence:
            image_type = str(dataset.get("ImageType", ""))
        is_capture = word(dataset, "SOPClassUID") == SecondaryCaptureImageStorage or "SCREEN" in image_type
        if is_capture or word(dataset, "ConversionType"):
            found.append("a scan or a picture of a screen, and the header does not deny writing")
    if picture is not None and max_strokes(picture) >= MIN_STROKES:
        found.append("bright strokes side by side, as writing has")
    return found


def max_strokes(picture: Image.Image) -> int:
    """Return the largest number of thin bright strokes beside each other in any band of rows.

    Writing is drawn near the largest value, in strokes a few pixels wide with dark sides; a line of it has many.
    """
    grey = np.asarray(picture.convert("RGB"), dtype=np.int16).max(axis=2)
    counts = np.array([_num_strokes(row, int(grey.max())) for row in grey])
    height = max(8, round(len(grey) * BAND))
    bands = (np.sort(counts[top : top + height])[::-1] for top in range(0, len(counts), height // 2))
    # Several rows of a band must agree: noise is bright in single rows.
    return max((int(band[3]) for band in bands if len(band) > 3), default=0)


def _num_strokes(row: NDArray[np.int16], largest: int) -> int:
    """Return the number of thin bright runs with dark sides in one row of a picture."""
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
"""Shows writing, which has the largest value, without showing a window's bright parts like it."""


HELD_BACK = "something may be written in the picture (--burned_in keep writes it all the same)"


def read_dataset(data: bytes, name: str) -> pydicom.FileDataset:
    """Return every field of a DICOM file that holds a picture.

    Raises:
        DataError: another format, damaged, or no picture.
    """
    if not is_dicom(data) and not may_be_bare(data):
        raise NotDicom(f"image {name} is no DICOM file")
    stream = io.BytesIO(data)
    with quiet(f"image {name} cannot be read"):
        check_inflated(stream, name)
        dataset = pydicom.dcmread(stream, force=True)
        fill_syntax(dataset)
    check_picture(dataset)
    return dataset


def clean_copy(dataset: pydicom.FileDataset, salt: bytes) -> tuple[str, bytes]:
    """Return the name of a clean copy, made of keys, and its content.

    Raises:
        DataError: the data set cannot be written.
    """
    with quiet("cannot be written as a clean copy"):
        copy = clean_dataset(dataset, salt)
        copy.file_meta = FileMetaDataset()
        copy.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
        copy.file_meta.MediaStorageSOPClassUID = copy.SOPClassUID
        copy.file_meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID
        stream = io.BytesIO()
        pydicom.dcmwrite(stream, copy, enforce_file_format=True)
    parts = [key_of(kind, field_text(dataset, IDENTITY_TAGS[kind]), salt) for kind in ("patient", "study", "instance")]
    return f"{'/'.join(parts)}.dcm", stream.getvalue()


def process_file(path: str, args: Namespace, salt: bytes, *, written: Collection[str]) -> tuple[DeidFindings, str]:
    """Inspect one file and, if asked for, write its clean copy; return the copy's name, or an empty one.

    Args:
        path: relative to the folder.
        args: of the program.
        salt: of the new identifiers.
        written: names of the copies that this run has written already.

    Raises:
        DataError: the file cannot be used, its copy would look different or replace that of another file.
    """
    data = read_bytes(path, args.folder)
    try:
        dataset = read_dataset(data, path)
        picture = load(data, dicom=WHOLE_RANGE)
        with quiet("cannot be inspected"):
            findings = inspect_dataset(dataset, picture)
        if args.out is None or (findings.suspicions and args.burned_in == "hold"):
            return findings, ""
        name, content = clean_copy(dataset, salt)
        if load(content).tobytes() != load(data).tobytes():
            raise DataError("would look different as a clean copy, so none is written")
        if name in written:
            raise RepeatedInstance("repeats an instance of this folder; the copy is that of the first file")
        write_atomic(args.out / name, content)
        return findings, name
    except DataError as error:
        text = str(error).removeprefix("image given as bytes ").removeprefix(f"image {path} ")
        raise type(error)(f"image {path} {text}") from None


def make_parser() -> Parser:
    """Return the options of `llava data deid`."""
    parser = Parser(
        prog="llava data deid", description="What in DICOM files may tell whose they are, and clean copies."
    )
    parser.add_argument("folder", type=Path, help="searched for DICOM files, also in folders inside it")
    parser.add_argument("--out", type=Path, help="folder of the clean copies; without it files are only inspected")
    parser.add_argument("--salt_file", help="secret of the new identifiers, made when absent; needed with --out")
    parser.add_argument("--report", type=Path, help="write what was found in each file as JSON")
    parser.add_argument(
        "--burned_in", choices=["hold", "keep"], default="hold", help="files in whose picture something may be written"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data deid`."""
    args = make_parser().parse_args(argv)
    log.setup()
    if args.out is not None and args.salt_file is None:
        raise ConfigError("--out needs --salt_file: without a secret the new identifiers could be traced back")
    if args.out is not None and args.out.resolve().is_relative_to(args.folder.resolve()):
        raise ConfigError(f"--out {args.out} lies inside {args.folder}; name a folder elsewhere")
    salt = b"" if args.salt_file is None else read_salt(args.salt_file)
    report: dict[str, dict[str, Any]] = {}
    written: set[str] = set()
    for path in progress(files_of(args.folder), title="inspecting", unit="file"):
        try:
            findings, name = process_file(path, args, salt, written=written)
            written |= {name} - {""}
            report[path] = {**asdict(findings), "copy": name or None}
            if args.out is not None and not name:
                report[path]["left_out"] = HELD_BACK
        except LlavaError as error:
            report[path] = {"left_out": str(error)}
    if args.report is not None:
        write_json(args.report, report)
    sys.stdout.write(_summary(report, copying=args.out is not None))


def _summary(report: Mapping[str, Mapping[str, Any]], *, copying: bool) -> str:
    read = [entry for entry in report.values() if "fields" in entry]
    fates = Counter((name, fate) for entry in read for name, fate in entry["fields"].items())
    reasons = Counter(reason for entry in read for reason in entry["suspicions"])
    lines = [f"{len(read)} of {len(report)} files are pictures that can be read"]
    lines += [f"  {count:>8} {fate:<9}{name}" for (name, fate), count in sorted(fates.items())]
    lines += [f"  {sum(entry['num_private'] for entry in read):>8} private fields (removed)"]
    lines += [f"{sum(bool(entry['suspicions']) for entry in read)} files may bear writing in the picture"]
    lines += [f"  {count:>8} {reason}" for reason, count in sorted(reasons.items())]
    if copying:
        held = sum(entry.get("left_out") == HELD_BACK for entry in read)
        lines += [f"{sum(bool(entry.get('copy')) for entry in read)} clean copies written"]
        lines += [f"  {held:>8} files held back: {HELD_BACK}"] if held else []
    if num_others := len(report) - len(read):
        lines += [f"{num_others} files left out: not DICOM, not a picture, damaged or repeated (--report says which)"]
    return "\n".join(lines) + "\n"
