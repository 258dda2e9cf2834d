"""Amount of prefill between two decoding steps on a CPU, limited so that running streams do not stall.

seconds of decoding steps, seconds of tokens that were read --Pace--> tokens of the next piece
"""

from __future__ import annotations

SHARE = 1.0
"""Maximum duration of a piece, in decoding steps."""

MIN_PIECE = 32
"""Minimum piece; for fewer tokens the fixed cost of a pass dominates."""

FIRST_PIECE = 128
"""Piece before the first measurement."""

WEIGHT = 0.3
"""Weight of the newest measurement in the averages."""


class Pace:
    """Moving averages of the durations of decoding steps and prefill pieces."""

    def __init__(self) -> None:
        """Create averages without measurements."""
        self._step: float | None = None
        self._token: float | None = None

    def note_step(self, seconds: float) -> None:
        """Record the duration of a decoding step."""
        self._step = _averaged(self._step, seconds)

    def note_piece(self, num_tokens: int, seconds: float) -> None:
        """Record the duration of a prefill piece."""
        # Includes fixed costs per call, so tokens of small pieces are more expensive.
        self._token = _averaged(self._token, seconds / num_tokens)

    @property
    def seconds(self) -> float:
        """Time that running answers may wait for a piece; 0 while nothing was measured."""
        return SHARE * (self._step or 0.0)

    def num_tokens(self, most: int) -> int:
        """Return the number of tokens for the next piece, at most `most`."""
        if self._step is None or not self._token:
            return min(most, FIRST_PIECE)
        return min(most, max(MIN_PIECE, int(SHARE * self._step / self._token)))


def _averaged(before: float | None, newest: float) -> float:
    return newest if before is None else before + WEIGHT * (newest - before)
