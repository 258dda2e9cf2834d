"""Converter for IU X-ray (Open-i, Indiana University): chest radiographs with reports.

    ecgen-radiology/1.xml (AbstractText COMPARISON, INDICATION, FINDINGS, IMPRESSION; parentImage id) + *.png
    indiana_reports.csv (uid, MeSH, Problems, image, indication, comparison, findings, impression)
        + indiana_projections.csv (uid, filename, projection) + images_normalized/

The dataset has no official split: a hash of the report number assigns each report to one split. The XML reports do not
state which image is frontal; add indiana_projections.csv to them, pass a table of the images' DICOM headers with
--header-table (columns imageid and View Position; the package torchxrayvision has one), or use --views all.

Command:
    llava data iu-xray NLMCXR_reports.tgz NLMCXR_png.tgz --views all --out data/iu-xray
"""

from __future__ import annotations

import importlib.util
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser
from xml.parsers import expat

from llava.data.converters.base import Converter, Job, run_converter
from llava.data.converters.dataset_cards import IU_XRAY
from llava.data.converters.items import SPLITS, ConvertedItem, Event, Excluded
from llava.data.converters.split import parse_fractions, split_of
from llava.data.converters.tables import cell_text, read_table
from llava.data.quarantine import BadRow
from llava.data.report_rows import TARGETS, VIEWS, is_frontal, report_question
from llava.errors import ConfigError, DataError, MissingDependency
from llava.samples import Origin
from llava.utils.cli import Parser

PACKAGED = "data/NLMCXR_reports.tgz"
"""Archive of all reports in the folder of the package torchxrayvision."""

MAX_BYTES = 16 << 20
MAX_DEPTH = 200


class _Refused(Exception):
    """Error: an XML document uses a feature that is not accepted."""


def read_xml(path: str | Path) -> Element:
    """Return the root element of an XML file.

    Raises:
        DataError: the file is not XML, is too large or too deep, or declares entities.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES} bytes; expected a single report")
    return parse_xml(data, str(path))


def parse_xml(data: bytes, name: str) -> Element:
    """Return the root element of an XML document.

    Args:
        data: the document.
        name: name of the document in messages.

    Raises:
        DataError: see `read_xml`.
    """
    try:
        _check_xml(data)
        parser = XMLParser(target=TreeBuilder())
        parser.feed(data)
        root = parser.close()
    except _Refused as reason:
        raise DataError(f"{name}: {reason}; such documents are not accepted") from None
    except (ParseError, expat.ExpatError, ValueError, LookupError) as error:
        raise DataError(f"{name}: not well-formed XML ({error})") from error
    assert isinstance(root, Element)
    return root


def _check_xml(data: bytes) -> None:
    """Check that a document declares no entities and is not too deep, without building a tree.

    Raises:
        _Refused: the document has one of these.
    """
    parser = expat.ParserCreate()
    depth = 0

    def refuse_entity(*parts: object) -> None:
        raise _Refused("the document declares an entity")

    def refuse_outside(*parts: object) -> int:
        raise _Refused("the document refers to another file")

    def start(name: str, attributes: object) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise _Refused(f"the elements are nested more than {MAX_DEPTH} deep")

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1

    parser.EntityDeclHandler = refuse_entity
    parser.UnparsedEntityDeclHandler = refuse_entity
    parser.ExternalEntityRefHandler = refuse_outside
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.Parse(data, True)


REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
IMAGE_FOLDERS = ("images/images_normalized", "images_normalized", "NLMCXR_png", "images")
SECTIONS = ("indication", "comparison", "findings", "impression")
ENDING = ".png"
_NAME = re.compile(r"(?:CXR)?(\d+)(?:_\d+)?_IM-([\d-]+)")


@dataclass(frozen=True, slots=True)
class Study:
    """One report with its images: pairs of file name and projection (empty if not stated)."""

    uid: str
    texts: dict[str, str]
    images: tuple[tuple[str, str], ...]
    origin: Origin
    problems: tuple[str, ...] = field(default=())
    license: str = ""


def read_events(job: Job) -> Iterator[Event]:
    """Yield a question for each image of each report."""
    fractions = parse_fractions(job.args.fractions)
    if not fractions.keys() <= set(SPLITS):
        raise ConfigError(f"--fractions: got splits {', '.join(fractions)}, expected only {', '.join(SPLITS)}")
    job.facts["split"] = f"no official one: by hash of the report, fractions {fractions}, seed {job.args.seed}"
    tables = job.sources.file(REPORTS)
    job.variant = "tables" if tables is not None else "xml"
    for study in _from_tables(job) if tables is not None else _from_xml(job):
        if isinstance(study, BadRow):
            yield study
            continue
        split = split_of(study.uid.removeprefix("CXR"), fractions, seed=job.args.seed)
        if not job.is_full(split):
            yield from _events(job, study, split)


def _events(job: Job, study: Study, split: str) -> Iterator[Event]:
    target = job.args.target
    if not study.texts.get(target):
        yield Excluded(split, f"report without {target}")
        return
    if not study.images:
        yield Excluded(split, "report without picture")
    for name, view in study.images:
        if job.args.views == "frontal" and not is_frontal(view):
            yield Excluded(split, "not a frontal view")
            continue
        identity = f"iuxray_{name.removesuffix(ENDING)}"
        try:
            image = job.sources.image(name, *IMAGE_FOLDERS)
        except DataError as error:
            yield BadRow(*study.origin, identity, str(error))
            continue
        meta = {
            "answer_type": "OPEN",
            "question_type": target,
            "image_organ": "CHEST",
            "modality": "X-ray",
            "view": view,
            "study": study.uid,
            "reason": study.texts.get("indication"),
            "problems": list(study.problems),
            "source": job.card.name,
            "license": study.license or job.card.license,
        }
        asked = report_question(target, study.texts.get("indication"))
        yield ConvertedItem(identity, split, asked, study.texts[target], image, name, meta, study.origin)


def _from_tables(job: Job) -> Iterator[Study | BadRow]:
    return table_studies(job.require_file(REPORTS), read_projections(job.require_file(PROJECTIONS)))


def table_studies(path: str | Path, images: Mapping[str, Sequence[tuple[str, str]]]) -> Iterator[Study | BadRow]:
    """Yield the studies of the table of reports.

    Args:
        path: indiana_reports.csv.
        images: file name and projection of the images of each report, see `read_projections`.

    Raises:
        DataError: the table cannot be read or lacks a column.
    """
    for origin, row in read_table(path, columns=("uid", *SECTIONS)):
        if isinstance(row, DataError):
            yield BadRow(*origin, "", str(row))
            continue
        texts = {name: " ".join(cell_text(row, name).split()) for name in SECTIONS}
        problems = tuple(part.strip() for part in cell_text(row, "Problems").split(";") if part.strip())
        uid = cell_text(row, "uid")
        yield Study(uid, texts, tuple(images.get(uid, [])), origin, problems)


def read_projections(path: str | Path) -> dict[str, list[tuple[str, str]]]:
    """Return pairs of file name and projection of the images of each report.

    Raises:
        DataError: a row cannot be read. Skipping it would lose the report of an image.
    """
    images: dict[str, list[tuple[str, str]]] = {}
    for origin, row in read_table(path, columns=("uid", "filename", "projection")):
        if isinstance(row, DataError):
            raise DataError(f"{origin}: {row}")
        images.setdefault(cell_text(row, "uid"), []).append((cell_text(row, "filename"), cell_text(row, "projection")))
    return images


def image_views(images: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, str]:
    """Return the projection of each image by the plain part of its name."""
    return {_plain(name): view for pairs in images.values() for name, view in pairs}


def header_views(path: str | Path) -> dict[str, str]:
    """Return the view position of each image by the plain part of its name, from a table of DICOM headers.

    Raises:
        DataError: the table cannot be read or lacks a column.
    """
    views: dict[str, str] = {}
    for origin, row in read_table(path, columns=("imageid", "View Position")):
        if isinstance(row, DataError):
            raise DataError(f"{origin}: {row}")
        views[_plain(cell_text(row, "imageid"))] = cell_text(row, "View Position")
    return views


def _from_xml(job: Job) -> Iterator[Study | BadRow]:
    files = job.sources.matching("*.xml")
    if not files:
        raise DataError(job.missing(f"{REPORTS} and no XML report"))
    views: dict[str, str] = {}
    if job.sources.file(PROJECTIONS) is not None:
        views = image_views(read_projections(job.require_file(PROJECTIONS)))
    elif job.args.header_table is not None:
        views = header_views(job.args.header_table)
        job.inputs[Path(job.args.header_table).name] = Path(job.args.header_table)
        job.facts["views"] = "View Position of the DICOM headers; images without one count as not frontal"
    elif job.args.views == "frontal":
        raise ConfigError(
            f"--views frontal: the XML reports do not state which image is frontal. Add {PROJECTIONS}, pass a table of "
            "DICOM headers with --header-table, or pass --views all"
        )
    job.facts["reports"] = len(files)
    for path in sorted(files, key=lambda path: (len(path.stem), path.stem)):
        try:
            yield read_study(path, views)
        except DataError as error:
            yield BadRow(str(path), 0, path.stem, str(error))


def read_study(path: Path, views: Mapping[str, str]) -> Study:
    """Return the study of an XML report; `views` maps plain image names to projections.

    Raises:
        DataError: see `read_xml`.
    """
    root = read_xml(path)
    texts = section_texts(root)
    uid = next((part.get("id", "") for part in root.iter("uId")), "") or path.stem
    named = [part.get("id", "").strip() for part in root.iter("parentImage")]
    images = tuple((f"{name}{ENDING}", views.get(_plain(name), "")) for name in named if name)
    problems = tuple("".join(part.itertext()).strip() for part in root.iter("major"))
    terms = next((part.get("url", "") for part in root.iter("licenseURL")), "")
    return Study(uid, texts, images, Origin(str(path), 0), problems, terms)


def section_texts(root: Element) -> dict[str, str]:
    """Return the report's sections by lower-case label (findings, indication ...), single-spaced."""
    texts: dict[str, str] = {}
    for section in root.iter("AbstractText"):
        name = section.get("Label", "").strip().lower()
        text = " ".join("".join(section.itertext()).split())
        texts[name] = f"{texts[name]} {text}".strip() if name in texts else text
    return texts


def packaged_documents() -> Iterator[tuple[str, Element]]:
    """Yield name and root element of each report in torchxrayvision, read from the installed package.

    Raises:
        MissingDependency: the package is not installed.
    """
    spec = importlib.util.find_spec("torchxrayvision")  # found, never imported: it needs torchvision
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / PACKAGED
    if path is None or not path.is_file():
        raise MissingDependency("torchxrayvision is not installed; run: bash scripts/setup.sh rad")
    with tarfile.open(path) as reports:
        for member in reports:
            stream = reports.extractfile(member) if member.name.endswith(".xml") else None
            if stream is not None:
                yield member.name, parse_xml(stream.read(), member.name)


def _plain(name: str) -> str:
    """Return the part of an image name that both releases share.

    The releases write CXR1_1_IM-0001-3001 and 1_IM-0001-3001.dcm.png.
    """
    found = _NAME.match(name)
    return f"{found[1]} {found[2]}" if found else name


def add_options(parser: Parser) -> None:
    """Add the options of this converter."""
    parser.add_argument("--target", choices=TARGETS, default="findings", help="report section that is the answer")
    parser.add_argument("--views", choices=VIEWS, default="frontal", help="views to include")
    parser.add_argument(
        "--fractions", default="train=0.7,val=0.1,test=0.2", help="fraction of the reports in each split"
    )
    parser.add_argument(
        "--header-table", metavar="FILE", help="table of DICOM headers that states the view of each image"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the assignment of reports to splits")


CONVERTER = Converter("iu-xray", IU_XRAY, read_events, add_options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data iu-xray`."""
    run_converter(CONVERTER, argv)
