"""Reasons of failed downloads: one word each, for manifests, summaries and exit codes.

an error's `reason` --REASONS--> text, whether a retry can help, whether it counts as a failure
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Reason(NamedTuple):
    """Meaning of one reason.

    Attributes:
        text: description.
        lasting: whether a retry of the same URLs gives the same result; a resumed run then skips it.
        expected: whether it happens to a part of any old list of URLs; it then does not change the exit status.
    """

    text: str
    lasting: bool = False
    expected: bool = False


REASONS: dict[str, Reason] = {
    "unreachable": Reason("no connection to the server"),
    "stalled": Reason("the server stopped sending, or sent too slowly"),
    "cut_off": Reason("the connection ended before the file did"),
    "unavailable": Reason("the server is overloaded or failing (429, 5xx)"),
    "refused": Reason("the server refuses the request (401, 403, other 4xx)"),
    "wrong_size": Reason("the size on the server differs from the published one"),
    "wrong_content": Reason("the content differs from the published one, or changed during the download"),
    "unsafe_address": Reason("the URL is not allowed", lasting=True),
    "too_large": Reason("larger than the limit", lasting=True),
    "not_an_archive": Reason("the file is not a .tar.gz", lasting=True),
    "corrupted": Reason("the archive is damaged", lasting=True),
    "truncated": Reason("the archive is incomplete", lasting=True),
    "bomb": Reason("the unpacked archive exceeds the limits", lasting=True),
    "unsafe_member": Reason("the figure's name in the archive is a link or device", lasting=True),
    "broken_image": Reason("the image cannot be decoded", lasting=True),
    "bad_row": Reason("the row of the list is invalid", lasting=True),
    "not_in_archive": Reason("the archive does not contain the figure", lasting=True, expected=True),
    "not_found": Reason("the server has no such file (404, 410)", lasting=True, expected=True),
}
"""Reasons by name; if several sources fail differently, the first in this order is reported: transient ones first."""


def most_telling(reasons: Iterable[str]) -> str:
    """Return the reason that comes first in `REASONS`."""
    order = list(REASONS)
    return min(reasons, key=order.index)
