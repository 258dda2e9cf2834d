"""XML from strangers to elements: no entity is ever defined or followed, no file is fetched, size is bounded.

The standard parser expands entities that a document defines for itself (a thousand bytes can become a gigabyte). A
document that declares one is refused before any element is built.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser
from xml.parsers import expat

from llava.errors import DataError

MAX_BYTES = 16 << 20
MAX_DEPTH = 200


class _Refused(Exception):
    """What a document holds that is not read."""


def read_xml(path: str | Path) -> Element:
    """Return the root element of an XML file.

    Raises:
        DataError: it is no XML, too large or too deep, or declares entities or a document type with them.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES} bytes; expected one report")
    return parse_xml(data, str(path))


def parse_xml(data: bytes, name: str) -> Element:
    """Return the root element of a document; `name` is for messages. Raises as `read_xml` does."""
    try:
        _look_through(data)
        parser = XMLParser(target=TreeBuilder())
        parser.feed(data)
        root = parser.close()
    except _Refused as reason:
        raise DataError(f"{name}: {reason}; such a document is not read") from None
    except (ParseError, expat.ExpatError, ValueError, LookupError) as error:
        raise DataError(f"{name}: not well-formed XML ({error})") from error
    assert isinstance(root, Element)
    return root


def _look_through(data: bytes) -> None:
    """Parse without building anything, and stop at the first declaration of an entity."""
    parser = expat.ParserCreate()
    depth = 0

    def refuse_entity(*parts: object) -> None:
        raise _Refused("it declares an entity")

    def refuse_outside(*parts: object) -> int:
        raise _Refused("it refers to another file")

    def start(name: str, attributes: object) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise _Refused(f"its elements lie more than {MAX_DEPTH} deep")

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1

    parser.EntityDeclHandler = refuse_entity
    parser.UnparsedEntityDeclHandler = refuse_entity
    parser.ExternalEntityRefHandler = refuse_outside
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.Parse(data, True)
