"""XML reports: accepted documents, refused entities and references, and the views of images."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava.data.converters.iu_xray import MAX_BYTES, header_views, main, parse_xml, read_xml
from llava.errors import ConfigError, DataError

BOMB = (
    '<!DOCTYPE r [<!ENTITY a "ha">' + "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9))
) + "]><r>&j;</r>"


def test_plain_documents_are_read() -> None:
    root = parse_xml(b'<?xml version="1.0"?><!DOCTYPE r><r><t a="1">x &lt; y</t></r>', "r.xml")
    assert root.find("t") is not None and root.findtext("t") == "x < y"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "declares an entity"),
        ('<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><r>&x;</r>', "declares an entity"),
        ('<!DOCTYPE r [<!ENTITY % p SYSTEM "http://127.0.0.1:1/x.dtd"> %p;]><r/>', "declares an entity"),
        ("<r>" * 300 + "</r>" * 300, "more than 200 deep"),
        ("<r>", "not well-formed"),
        ("<r>&unknown;</r>", "not well-formed"),
        ("", "not well-formed"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"r\.xml: .*{reason}"):
        parse_xml(text.encode(), "r.xml")


def test_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large.xml"
    path.write_bytes(b"<r>" + b" " * MAX_BYTES + b"</r>")
    with pytest.raises(DataError, match="larger than"):
        read_xml(path)


@given(st.binary(max_size=200) | st.text(st.sampled_from('<>/r!DOCTYPE[]ENTIY&;"= '), max_size=80).map(str.encode))
def test_any_bytes_give_an_element_or_a_named_error(data: bytes) -> None:
    try:
        parse_xml(data, "any")
    except DataError:
        return


HEADERS = "imageid,Rows,View Position\nCXR7_IM-0003-1001,2,PA\nCXR7_IM-0003-2001,2,LL\nCXR8_IM-0004-1001,2,\n"


def test_views_from_a_table_of_dicom_headers(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "headers.csv.gz", "wt") as table:
        table.write(HEADERS)
    assert header_views(tmp_path / "headers.csv.gz") == {"7 0003-1001": "PA", "7 0003-2001": "LL", "8 0004-1001": ""}


def test_a_table_without_views_is_refused(tmp_path: Path) -> None:
    (tmp_path / "headers.csv").write_text("imageid,Rows\nCXR7_IM-0003-1001,2\n")
    with pytest.raises(DataError, match="no column 'View Position'"):
        header_views(tmp_path / "headers.csv")


def report_xml(number: int) -> str:
    images = "".join(f'<parentImage id="CXR{number}_IM-0003-{n}001"/>' for n in (1, 2))
    text = '<AbstractText Label="FINDINGS">Clear lungs.</AbstractText>'
    return f'<eCitation><uId id="CXR{number}"/>{text}{images}</eCitation>'


@pytest.mark.parametrize(("views", "expected"), [("frontal", ["CXR7_IM-0003-1001"]), ("all", None)])
def test_frontal_views_of_xml_reports(tmp_path: Path, views: str, expected: list[str] | None) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "7.xml").write_text(report_xml(7))
    for number in (1, 2):
        Image.new("L", (8, 8), number).save(source / f"CXR7_IM-0003-{number}001.png")
    (tmp_path / "headers.csv").write_text(HEADERS)
    words = [str(source), "--out", str(tmp_path / "out"), "--views", views, "--fractions", "train=1.0"]
    main([*words, "--header-table", str(tmp_path / "headers.csv")])
    rows = json.loads((tmp_path / "out" / "train.json").read_text())
    names = [row["id"].removeprefix("iuxray_") for row in rows]
    assert names == (expected or ["CXR7_IM-0003-1001", "CXR7_IM-0003-2001"])


def test_frontal_views_without_a_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "7.xml").write_text(report_xml(7))
    with pytest.raises(ConfigError, match="--header-table"):
        main([str(tmp_path), "--out", str(tmp_path / "out")])
