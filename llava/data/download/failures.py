"""Why something could not be had: one word each, for manifests, summaries and exit codes.

an error's `reason` --REASONS--> what it means, whether asking again can help, whether it is nobody's fault
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Reason(NamedTuple):
    """What one word means.

    Attributes:
        text: for people.
        lasting: asking the same urls again gives the same; a resumed run does not.
        expected: happens to a part of any old list of urls; no cause for a failing exit status.
    """

    text: str
    lasting: bool = False
    expected: bool = False


REASONS: dict[str, Reason] = {
    "unreachable": Reason("no connection to the server"),
    "stalled": Reason("the server stopped sending, or sent too slowly"),
    "cut_off": Reason("the connection ended before the file did"),
    "unavailable": Reason("the server is overloaded or failing (429, 5xx)"),
    "refused": Reason("the server refuses to hand it out (401, 403, other 4xx)"),
    "wrong_size": Reason("the server offers another size than the published one"),
    "wrong_content": Reason("the content is not what was published, or changed in between"),
    "unsafe_address": Reason("the url may not be fetched", lasting=True),
    "too_large": Reason("larger than the limit", lasting=True),
    "not_an_archive": Reason("what was sent is no .tar.gz", lasting=True),
    "corrupted": Reason("the archive is damaged", lasting=True),
    "truncated": Reason("the archive ends too early", lasting=True),
    "bomb": Reason("the archive unpacks to more than the limits allow", lasting=True),
    "unsafe_member": Reason("the archive has the figure's name, but as a link or device", lasting=True),
    "broken_image": Reason("the picture does not decode", lasting=True),
    "bad_row": Reason("the list's row cannot be used", lasting=True),
    "not_in_archive": Reason("the archive does not hold the figure", lasting=True, expected=True),
    "not_found": Reason("the server has no such file (404, 410)", lasting=True, expected=True),
}
"""In the order in which they are told when several sources failed in different ways: what may pass comes first."""


def most_telling(reasons: Iterable[str]) -> str:
    """Return the reason that comes first in `REASONS`."""
    order = list(REASONS)
    return min(reasons, key=order.index)
