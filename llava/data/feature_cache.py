"""Cache of frozen vision tower features, computed once per image and kept in a memory-mapped file.

    keys of all images --build--> tower, for the missing ones only --> FOLDER/features.bin  [images, P, Dv]
    key --FeatureCache.get--> its row, mapped from the file: all ranks and workers share one copy in memory

A folder belongs to one tower (hash of weights and settings), and a key covers file bytes and preprocessing. Stale
features are therefore never returned: another tower has another folder, a changed image another key.

Files: `header.json` (tower, shape, dtype), `features.bin` (consecutive rows), `keys.txt` (one key per line, in row
order). A row is written and synced before its key: a build that was killed resumes after its last key.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.errors import ConfigError, DataError
from llava.utils.files import hold_lock
from llava.utils.jsonl import write_json
from llava.utils.log import progress_bar
from llava.utils.provenance import TensorHash, tensor_bytes

logger = logging.getLogger(__name__)

GB = 10**9
VERSION = 1


class FeatureCache:
    """Read access to the cached features of one tower; `build` computes them.

    It can be pickled: a worker process maps the file again.

    Args:
        folder: folder of one tower, as written by `build`.

    Raises:
        DataError: the folder is not a feature cache, or the cache is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            header = json.loads((self.folder / "header.json").read_text(encoding="utf-8"))
            self.tower: str = header["tower"]
            self.shape: tuple[int, ...] = tuple(header["shape"])
            self.dtype: torch.dtype = getattr(torch, header["dtype"])
            self._rows = {key: row for row, key in enumerate(_read_keys(self.folder))}
            size = (self.folder / "features.bin").stat().st_size
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"feature cache {self.folder} cannot be read ({error}); remove the folder") from error
        if size < self.num_bytes:
            raise DataError(
                f"feature cache {self.folder} is damaged: features.bin has {size} bytes, expected {self.num_bytes} for "
                f"{len(self)} images; remove the folder"
            )
        self._map: Tensor | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    @property
    def num_bytes(self) -> int:
        """Return the size of all features in bytes."""
        return len(self) * _row_bytes(self.shape, self.dtype)

    def get(self, key: str) -> Tensor:
        """Return a copy of the features [P, Dv] of an image.

        Raises:
            DataError: the image is not in the cache.
        """
        if key not in self._rows:
            raise DataError(f"image key {key!r} is not in feature cache {self.folder}; build the cache for these rows")
        if self._map is None:
            num = len(self) * prod(self.shape)
            flat = torch.from_file(str(self.folder / "features.bin"), shared=False, size=num, dtype=self.dtype)
            self._map = flat.view(len(self), *self.shape)
        return self._map[self._rows[key]].clone()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __getstate__(self) -> Mapping[str, Any]:
        return {**self.__dict__, "_map": None}


def build_feature_cache(
    root: str | Path,
    keys: Sequence[str],
    *,
    tower: str,
    pixels: Callable[[str], Tensor],
    features: Callable[[Tensor], Tensor],
    limit_gb: float = 4.0,
    dtype: torch.dtype | None = None,
    batch_size: int = 16,
    num_threads: int | None = None,
) -> FeatureCache:
    """Return a cache that holds the features of all `keys`; missing ones are computed.

    Processes that call this at the same time are serialized: the first builds the cache, the others wait for it.

    Args:
        root: folder of all caches; the subfolder of this tower is logged.
        keys: image keys.
        tower: identity of the tower, see `weights_hash`.
        pixels: image key to preprocessed image [3, H, W]; called from several threads.
        features: images [N, 3, H, W] to features [N, P, Dv], as the model computes them.
        limit_gb: largest size of the whole cache in units of 10^9 bytes.
        dtype: storage dtype; None keeps that of `features`, so that training with and without the cache is equal.
        batch_size: number of images per call of `features`.
        num_threads: threads that decode images; None takes one per processor, at most 16.

    Raises:
        ConfigError: `keys` is empty; or the cache would exceed `limit_gb` or the free space (the message says how much
            is needed).
        DataError: an image does not decode, or the folder is damaged.
    """
    if not keys:
        raise ConfigError("no row has an image, so no tower features can be cached; turn the feature cache off")
    folder = _folder_of(root, tower, dtype)
    with hold_lock(folder / "lock", purpose="tower features"):
        known = set(_read_keys(folder)) if (folder / "header.json").is_file() else set()
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        if missing:
            plan = _Plan(missing, pixels, features, dtype, batch_size, num_threads or min(16, os.cpu_count() or 1))
            _extend(folder, tower, plan, num_known=len(known), limit_gb=limit_gb)
        cache = FeatureCache(folder)
    logger.info(
        "tower features: %d images, %.2f GB, in %s (remove the folder to free the space)",
        len(cache),
        cache.num_bytes / GB,
        folder,
    )
    return cache


def _folder_of(root: str | Path, tower: str, dtype: torch.dtype | None) -> Path:
    """Return the folder of one tower and storage dtype, created if missing."""
    folder = Path(root) / f"tower-{tower[:16]}{'' if dtype is None else f'-{_name(dtype)}'}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def weights_hash(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Return a hash that identifies a tower: its weights and all settings that change its output.

    Args:
        weights: state dict of the tower.
        settings: JSON values, for example the selected layer and feature.
    """
    found = TensorHash(json.dumps(dict(settings), sort_keys=True, default=str))
    for name, tensor in sorted(weights.items()):
        found.add(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n", tensor)
    return found.value()


@dataclass(frozen=True, slots=True)
class _Plan:
    """Work of one build: missing keys in batches, decoded one batch ahead of the tower's use."""

    keys: Sequence[str]
    pixels: Callable[[str], Tensor]
    features: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None
    batch_size: int
    num_threads: int

    def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
        """Yield keys and their features [N, P, Dv] on the CPU."""
        starts = [*range(0, len(self.keys), self.batch_size), len(self.keys)]
        batches = [list(self.keys[start:stop]) for start, stop in pairwise(starts)]
        with ThreadPoolExecutor(self.num_threads) as pool:
            decoding = [pool.submit(self.pixels, key) for key in batches[0]]
            for number, batch in enumerate(batches):
                images = torch.stack([future.result() for future in decoding])
                following = batches[number + 1] if number + 1 < len(batches) else []
                decoding = [pool.submit(self.pixels, key) for key in following]
                with torch.no_grad():
                    found = self.features(images).detach()
                yield batch, found.to("cpu", self.dtype or found.dtype).contiguous()


def _extend(folder: Path, tower: str, plan: _Plan, *, num_known: int, limit_gb: float) -> None:
    """Compute the features of the plan and append them to the files of the folder."""
    with progress_bar(len(plan.keys), title="tower features", unit="image") as bar:
        row = num_known
        _drop_torn_key(folder)
        for batch, found in plan:
            if row == num_known:
                _check_room(folder, found, num_known + len(plan.keys), len(plan.keys), limit_gb)
                _check_header(folder, tower, found)
            _append(folder, row, batch, found)
            row += len(batch)
            bar.update(len(batch))


def _append(folder: Path, row: int, keys: Sequence[str], found: Tensor) -> None:
    """Write features from row `row` on, then their keys; leftovers of a killed build are overwritten."""
    path = folder / "features.bin"
    path.touch()
    with path.open("r+b") as stream:
        stream.seek(row * _row_bytes(found.shape[1:], found.dtype))
        stream.write(tensor_bytes(found))
        stream.flush()
        os.fsync(stream.fileno())
    with (folder / "keys.txt").open("a", encoding="ascii") as lines:
        lines.write("".join(f"{key}\n" for key in keys))


def _drop_torn_key(folder: Path) -> None:
    """Truncate an incomplete last line of a killed build, so that the next key starts a new line."""
    path = folder / "keys.txt"
    path.touch()
    os.truncate(path, sum(len(key) + 1 for key in _read_keys(folder)))


def _check_room(folder: Path, found: Tensor, num_images: int, num_new: int, limit_gb: float) -> None:
    row = _row_bytes(found.shape[1:], found.dtype)
    needed, free = num_images * row, shutil.disk_usage(folder).free
    if needed > limit_gb * GB:
        raise ConfigError(
            f"tower features of {num_images} images need {needed / GB:.2f} GB, but --feature-cache-gb is {limit_gb:g}; "
            f"raise it to {needed / GB + 0.01:.2f} or turn the cache off"
        )
    if num_new * row > free:
        raise ConfigError(
            f"tower features need {num_new * row / GB:.2f} GB more in {folder}, but only {free / GB:.2f} GB are free; "
            f"choose another folder or turn the cache off"
        )


def _check_header(folder: Path, tower: str, found: Tensor) -> None:
    """Write the header of a new cache, or check that an existing one holds rows of the same kind."""
    path = folder / "header.json"
    header = {"version": VERSION, "tower": tower, "shape": list(found.shape[1:]), "dtype": _name(found.dtype)}
    if not path.is_file():
        write_json(path, header)
    elif json.loads(path.read_text(encoding="utf-8")) != header:
        raise DataError(f"feature cache {folder} holds other features, expected {header}; remove the folder")


def _read_keys(folder: Path) -> list[str]:
    """Return the keys in row order, without an incomplete last one of a killed build."""
    path = folder / "keys.txt"
    return path.read_text(encoding="ascii").split("\n")[:-1] if path.is_file() else []


def _row_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
