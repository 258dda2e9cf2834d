"""Texts and bytes of single tokens, for the log-probabilities of the OpenAI protocol."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
MARK = "\N{LOWER ONE EIGHTH BLOCK}"
BROKEN = "\N{REPLACEMENT CHARACTER}"

Alternatives = Sequence[tuple[int, float]]
"""Likeliest tokens at one place, with their log-probabilities."""


class TokenTexts:
    """Texts of the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Create the texts of a transformers tokenizer."""
        self.tokenizer = tokenizer
        self.text_of = lru_cache(maxsize=1 << 16)(self._text_of)

    def _text_of(self, token_id: int) -> tuple[str, bytes | None]:
        """Return text and bytes of a token; text None where the bytes are part of a multi-token character."""
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return "", b""
        if found := BYTE_TOKEN.fullmatch(piece):
            byte = bytes([int(found[1], 16)])
            return byte.decode(errors="replace"), byte
        if MARK in piece:
            text = piece.replace(MARK, " ")
            return text, text.encode()
        text = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return text, None if BROKEN in text else text.encode()

    def entry(self, token_id: int, logprob: float, *, with_id: bool = False) -> dict[str, Any]:
        """Return a token with its log-probability."""
        text, data = self.text_of(token_id)
        made = {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}
        return {**made, "token_id": token_id} if with_id else made

    def entries(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        alternatives: Sequence[Alternatives],
        *,
        with_ids: bool = False,
    ) -> list[dict[str, Any]]:
        """Return `logprobs.content` of an answer; `alternatives` is empty or as long as the tokens."""
        found = []
        for place, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            others = alternatives[place] if place < len(alternatives) else ()
            top = [self.entry(other, value, with_id=with_ids) for other, value in others]
            found.append({**self.entry(token_id, logprob, with_id=with_ids), "top_logprobs": top})
        return found
