"""How much of new prompts is read between two steps of running answers on a CPU, so that their streams do not halt.

seconds of decoding steps, seconds of tokens that were read --Pace--> tokens of the next piece
"""

from __future__ import annotations

SHARE = 1.0
"""Largest time of a piece, in decoding steps."""

MIN_PIECE = 32
"""Smallest piece: below it, the calls of a pass cost as much as its tokens."""

FIRST_PIECE = 128
"""Piece while nothing was measured."""

WEIGHT = 0.3
"""Weight of the newest time in the averages."""


class Pace:
    """Averages of the last decoding steps and pieces."""

    def __init__(self) -> None:
        """Start without times."""
        self._step: float | None = None
        self._token: float | None = None

    def note_step(self, seconds: float) -> None:
        """Take the time of a decoding step."""
        self._step = _averaged(self._step, seconds)

    def note_piece(self, num_tokens: int, seconds: float) -> None:
        """Take the time of a piece."""
        # Calls that do not depend on the number of tokens count too: small pieces have dear tokens.
        self._token = _averaged(self._token, seconds / num_tokens)

    def num_tokens(self, most: int) -> int:
        """Return the number of tokens of the next piece, at most `most`."""
        if self._step is None or not self._token:
            return min(most, FIRST_PIECE)
        return min(most, max(MIN_PIECE, int(SHARE * self._step / self._token)))


def _averaged(before: float | None, newest: float) -> float:
    return newest if before is None else before + WEIGHT * (newest - before)
