"""Model inputs of recently shown images, so that the next question about one does not decode it again.

    caller, image key --made--> pixels and size; computed once, also for questions that arrive together
                                least recently used ones are dropped above a number of bytes

Each caller has its own, as in `prefix_cache`: the time to the first token would tell whether another one has shown it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llava.imaging.anyres import Size


@dataclass(frozen=True, slots=True)
class Pixels:
    """Preprocessed image [3, H, W], or tiles [K, 3, H, W], and the size of the image before."""

    tensor: Tensor
    size: Size


class PixelCache:
    """Pixels of images by caller and image key; threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        """Create an empty cache of at most `max_bytes`."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[tuple[str, str], Pixels] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[tuple[str, str], threading.Lock] = {}

    def made(self, owner: str, key: str, make: Callable[[], Pixels]) -> Pixels:
        """Return the pixels of an image that this caller has shown before, or make and keep them.

        Args:
            owner: the caller.
            key: what identifies the image.
            make: decodes and preprocesses it; while one thread does, others that want the same image wait.
        """
        with self._lock:
            if (known := self._found(owner, key)) is not None:
                return known
            making = self._making.setdefault((owner, key), threading.Lock())
        with making:
            with self._lock:
                if (known := self._found(owner, key)) is not None:
                    return known
            pixels = None
            try:
                pixels = make()
            finally:
                with self._lock:  # at once, so that no thread finds neither the image nor the lock of its making
                    if pixels is not None:
                        self._keep(owner, key, pixels)
                    self._making.pop((owner, key), None)
        return pixels

    def _found(self, owner: str, key: str) -> Pixels | None:
        pixels = self._kept.get((owner, key))
        if pixels is not None:
            self._kept.move_to_end((owner, key))
        return pixels

    def _keep(self, owner: str, key: str, pixels: Pixels) -> None:
        if (owner, key) in self._kept or pixels.tensor.nbytes > self.max_bytes:
            return
        self._kept[owner, key] = pixels
        self.num_bytes += pixels.tensor.nbytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= dropped.tensor.nbytes
