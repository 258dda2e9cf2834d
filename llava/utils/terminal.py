"""Text for terminals and logs: control characters of names and rows are written as visible escapes.

A terminal obeys control characters: an escape sequence in the name of a file or tensor, in a row or in an answer could
hide text, rename the window or write to the clipboard. Bidirectional marks reorder what is read.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# All of the Unicode categories Cc, Cf (but joiners and soft hyphens, which scripts need), Cs, Zl and Zp.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Return a text as one line in which control characters are escapes: `\n`, `\x1b`, `\u202e`."""
    return text if text.isprintable() else _HIDDEN.sub(_escape, text)


def visible_lines(text: str) -> str:
    """Return a text as `visible` does, but keep line feeds and tabs."""
    return text if text.isprintable() else _HIDDEN.sub(_escape_in_lines, text)


def visible_message(text: str) -> str:
    """Return a text as `visible_lines` does, with continuation lines indented to keep them recognizable."""
    first, *others = visible_lines(text).split("\n")
    return "\n".join([first, *(line if line.startswith(" ") else f"  {line}" for line in others)])


def write_out(text: str, out: TextIO | None = None) -> None:
    """Write the lines of a command to `out`, by default standard output, with visible control characters."""
    (out or sys.stdout).write(visible_lines(text))


def _escape(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


def _escape_in_lines(found: re.Match[str]) -> str:
    return found[0] if found[0] in "\n\t" else _escape(found)
