"""Incremental decoding of a growing list of tokens.

    tokens   [ settled ............ | context | new ... ]
    text  =    text before the context + decode(context + new)

Decoding is not local: bytes join to characters, and spaces are dropped at the start or before punctuation. The context
absorbs that; when it does not, the text of the context changes, and all tokens are decoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
"""Character that a tokenizer writes for bytes that do not (yet) form a character."""

CONTEXT = 16
"""Number of tokens that are decoded again with the new ones."""


class GrowingText:
    """Cache for `decode`: `text(ids)` equals `decode(ids)`, cheap when `ids` extends the previous ids."""

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
        """Make the last tokens the new context if decoding them alone gives the end of the whole text."""
        head = self.decode(ids[-CONTEXT:])
        # An incomplete character may still become another text.
        if head and BROKEN not in head and text.endswith(head):
            self._settled, self._head = ids, head
            self._before = text[: len(text) - len(head)]
