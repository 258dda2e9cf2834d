"""Chest X-ray reports of Indiana University that the package torchxrayvision carries, read where they lie."""

from __future__ import annotations

import importlib.util
import tarfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from llava.data.converters.iu_xray import parse_xml
from llava.errors import MissingDependency

ARCHIVE = "data/NLMCXR_reports.tgz"


def packaged_documents() -> Iterator[tuple[str, Element]]:
    """Yield name and root element of each report.

    Raises:
        MissingDependency: the package is not installed.
    """
    spec = importlib.util.find_spec("torchxrayvision")  # found, never imported: it needs torchvision
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / ARCHIVE
    if path is None or not path.is_file():
        raise MissingDependency("torchxrayvision is not installed; run: bash scripts/setup.sh rad")
    with tarfile.open(path) as reports:
        for member in reports:
            stream = reports.extractfile(member) if member.name.endswith(".xml") else None
            if stream is not None:
                yield member.name, parse_xml(stream.read(), member.name)


def section_texts(root: Element) -> dict[str, str]:
    """Return the texts of a report by their labels (FINDINGS, INDICATION ...), with single spaces."""
    return {part.get("Label", ""): " ".join("".join(part.itertext()).split()) for part in root.iter("AbstractText")}
