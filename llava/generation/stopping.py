"""End of an answer and its text: end tokens, stop strings across token borders, complete characters.

token ids --decode--> raw text --cut at stop strings, without headers and white space--> the answer
                               --without a suffix that may become a stop string--> the answer so far
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llava.chat_template import answer_start, first_stop
from llava.generation.protocol import Sampling
from llava.processing import LlavaMedProcessor
from llava.tokenization import token_id

TOKENS_PER_CHARACTER = 4
"""Maximum number of tokens of one character (one per byte)."""

BROKEN = "\ufffd"
"""Character that a tokenizer writes for bytes that do not (yet) form a character."""

CONTEXT = 16
"""Number of tokens that are decoded again with the new ones."""

MAX_TAIL = 64
"""Number of tokens at the end of an answer that are decoded at each step; a longer end is decoded piece by piece."""


class GrowingText:
    """Cache for `decode`: `text(ids)` equals `decode(ids)`, cheap when `ids` extends the previous ids.

    tokens   [ settled ............ | context | new ... ]
    text  =    text before the context + decode(context + new)
    """

    # Decoding is not local: bytes join to characters, and spaces are dropped at the start or before punctuation. The
    # context absorbs that; when it does not, the text of the context changes, and all tokens are decoded again.

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
        if not tail.startswith(self._head):  # new tokens changed text that was considered final
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


@dataclass(frozen=True, slots=True)
class StopRule:
    """Conditions that end an answer.

    Attributes:
        token_ids: tokens that end it.
        texts: strings that end it anywhere in the text.
        watched: those of `texts` that generation must search for; the others are single tokens.
        echoes: role headers that a model may repeat before its answer; they are not part of it.
        byte_ids: tokens of single bytes, whose texts depend on the bytes after them.
    """

    token_ids: frozenset[int]
    texts: tuple[str, ...]
    watched: tuple[str, ...]
    echoes: tuple[str, ...] = ()
    byte_ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, processor: LlavaMedProcessor, sampling: Sampling) -> StopRule:
        """Return the rule for a model's template and a request's stop strings."""
        special = {
            str(token): token_id
            for token_id, token in processor.tokenizer.added_tokens_decoder.items()
            if token.special
        }
        texts = tuple(dict.fromkeys((*processor.template.stops, *sampling.stop)))
        token_ids = {special[text] for text in texts if text in special}
        return cls(
            frozenset({*processor.stop_token_ids, *token_ids}),
            texts,
            tuple(text for text in texts if text not in special),
            processor.template.echoes,
            byte_token_ids(processor.tokenizer),
        )

    @property
    def num_tail_tokens(self) -> int:
        """Number of tokens at the end of a text that contain a stop string that has just appeared."""
        return TOKENS_PER_CHARACTER * (max(map(len, self.watched), default=0) + 1)

    def find(self, text: str) -> int | None:
        """Return where the first stop string of the answer begins; None without one."""
        return first_stop(text, self.texts, start=answer_start(text, self.echoes))

    def answer(self, text: str) -> str:
        """Return the finished answer in `text`."""
        return _trimmed(text[answer_start(text, self.echoes) : self.find(text)])

    def answer_so_far(self, text: str) -> str:
        """Return the part of an unfinished answer that later tokens cannot change."""
        end = self.find(text)
        if end is not None:
            return self.answer(text)
        whole = text.rstrip(BROKEN)
        start = answer_start(whole, self.echoes)
        answer = whole[start:]
        if any(echo.startswith(answer) for echo in self.echoes):
            return ""
        held = max((_overlap(answer, stop) for stop in self.texts), default=0)
        return _trimmed(answer[: len(answer) - held])


def _trimmed(text: str) -> str:
    """Return the text without white space and incomplete characters at its end."""
    while text and (text[-1] == BROKEN or text[-1].isspace()):
        text = text[:-1]
    return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    start = max(0, len(text) - len(stop) + 1)
    # Only where the first character stands: each event of every answer asks this for all stop strings.
    while (start := text.find(stop[:1], start)) >= 0:
        if text.endswith(stop[: len(text) - start]):
            return len(text) - start
        start += 1
    return 0


class AnswerText:
    """Text of a growing answer; decoded only when a stop string may have appeared or the text is read."""

    __slots__ = ("decode", "growing", "rule")

    def __init__(self, rule: StopRule, decode: Callable[[Sequence[int]], str]) -> None:
        """Apply `rule`; `decode` returns the text of token ids."""
        self.rule = rule
        self.decode = decode
        self.growing = GrowingText(decode)

    def has_ended(self, token_ids: Sequence[int]) -> bool:
        """Return whether the newest token ends the answer."""
        rule = self.rule
        if token_ids[-1] in rule.token_ids:
            return True
        if not rule.watched:
            return False
        num_tail = rule.num_tail_tokens
        tail = self.decode(token_ids[-num_tail:]) if num_tail <= MAX_TAIL else self.growing.text(token_ids)
        if not any(stop in tail for stop in rule.watched):
            return False
        return rule.find(self.decode(token_ids)) is not None

    def final(self, token_ids: Sequence[int]) -> str:
        """Return the finished answer."""
        return self.rule.answer(self.decode(token_ids))

    def so_far(self, token_ids: Sequence[int]) -> str:
        """Return the part of the answer that later tokens cannot change."""
        end = len(token_ids)
        # A run of bytes that is not valid as a whole becomes another text, in front of its last byte too.
        while end and token_ids[end - 1] in self.rule.byte_ids:
            end -= 1
        return self.rule.answer_so_far(self.growing.text(token_ids[:end]))


@lru_cache(maxsize=8)
def byte_token_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens `<0x00>` to `<0xFF>` of a sentencepiece vocabulary; empty for others."""
    found = (token_id(tokenizer, f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(number for number in found if number is not None)
