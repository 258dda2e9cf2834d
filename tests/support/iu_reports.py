"""Findings of the Indiana University reports that the package torchxrayvision carries; read where they lie."""

from __future__ import annotations

import importlib.util
import tarfile
from functools import cache
from pathlib import Path

import pytest

from llava.data.converters.iu_xray import parse_xml

ARCHIVE = "data/NLMCXR_reports.tgz"


@cache
def archive() -> Path | None:
    """Return the archive of the reports; None where the package is not installed."""
    spec = importlib.util.find_spec("torchxrayvision")  # found, never imported: it needs torchvision
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / ARCHIVE
    return path if path is not None and path.is_file() else None


@cache
def iu_findings() -> dict[str, str]:
    """Return the findings of each report that has some, by uid, with white space joined."""
    path = archive()
    if path is None:
        pytest.skip("torchxrayvision is not installed; run: bash scripts/setup.sh rad")
    found: dict[str, str] = {}
    with tarfile.open(path) as reports:
        for member in reports:
            stream = reports.extractfile(member) if member.name.endswith(".xml") else None
            if stream is None:
                continue
            root = parse_xml(stream.read(), member.name)
            uid = next(part.get("id", "") for part in root.iter("uId"))
            texts = ["".join(part.itertext()) for part in root.iter("AbstractText") if part.get("Label") == "FINDINGS"]
            text = " ".join(" ".join(texts).split())
            if text:
                found[uid] = text
    return found
