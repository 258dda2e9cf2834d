"""Text of a growing list of tokens: each call decodes the newest tokens only.

    tokens   [ settled ............ | context | new ... ]
    text  =    text before the context + decode(context + new)

Decoders are not local: they join bytes to characters, drop a leading space, or take a space away before a full stop.
The context absorbs that, and whatever it does not absorb is noticed: everything is then decoded from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
"""What a tokenizer writes for bytes that are not (yet) a character."""

CONTEXT = 16
"""Tokens that are decoded again with the new ones."""


class GrowingText:
    """A cache for `decode`: `text(ids)` equals `decode(ids)`, and is cheap when `ids` continues the previous ones."""

    __slots__ = ("_before", "_head", "_settled", "decode")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Start empty; `decode` returns the text of token ids."""
        self.decode = decode
        self._forget()

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of all tokens."""
        ids = list(token_ids)
        if ids[: len(self._settled)] != self._settled:
            self._forget()
        tail = self.decode(ids[self._first :])
        if not tail.startswith(self._head):  # new tokens changed what was settled
            self._forget()
            tail = self.decode(ids)
        text = self._before + tail
        if len(ids) - len(self._settled) >= CONTEXT:
            self._settle(ids, text)
        return text

    @property
    def _first(self) -> int:
        """Number of tokens before the context."""
        return max(0, len(self._settled) - CONTEXT)

    def _forget(self) -> None:
        self._settled: list[int] = []
        self._before, self._head = "", ""

    def _settle(self, ids: list[int], text: str) -> None:
        """Make the last tokens the new context if, alone, they have the text that they have among all."""
        head = self.decode(ids[-CONTEXT:])
        # A torn character, or bytes that are none together, may still become another text.
        if head and BROKEN not in head and text.endswith(head):
            self._settled, self._head = ids, head
            self._before = text[: len(text) - len(head)]
