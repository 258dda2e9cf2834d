"""XML reports: accepted documents, and that entities and references are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.converters.iu_xray import MAX_BYTES, parse_xml, read_xml
from llava.errors import DataError

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
