"""Search for the first text of a streamed answer; roles, waits and bare prompts are none."""

from __future__ import annotations

import json
import re

SOME_CONTENT = re.compile(rb'"content": ?"[^"]')
"""Text in a chunk of the OpenAI protocol; the first chunk has the role and an empty text."""


class ContentSearch:
    """Search in the pieces of one answer, which may end anywhere."""

    def __init__(self, protocol: str, prompt: str) -> None:
        """Search for text in chunks of `openai`, or for text after the prompt in frames of `llava`."""
        self._is_old = protocol == "llava"
        self._num_prompt = len(prompt)
        self._rest = b""

    def finds(self, piece: bytes) -> bool:
        """Return whether a chunk or frame that ends in this piece has content."""
        *whole, self._rest = (self._rest + piece).split(b"\0" if self._is_old else b"\n\n")
        return any(self._has_text(one) if self._is_old else SOME_CONTENT.search(one) for one in whole)

    def _has_text(self, frame: bytes) -> bool:
        try:
            found = json.loads(frame)
        except ValueError:
            return False
        text = found.get("text") if isinstance(found, dict) and found.get("error_code") == 0 else None
        return isinstance(text, str) and len(text) > self._num_prompt
