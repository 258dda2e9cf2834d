"""Folders of recorded numbers: their files and models, found by content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from llava.compat import COMPAT
from llava.model.builder import LoadedModel
from llava.model.checkpoint.load import load_checkpoint

Status = Literal["ok", "FAIL", "skipped"]

MAX_LISTED = 8
"""Number of wrong names in a note."""

IMAGE_MARK = -200
"""Token id of an image placeholder in the originals."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = ("tokenizer.model", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Line:
    """Compared quantity of the report.

    Attributes:
        quantity: name of the quantity.
        difference: largest difference; None if nothing could be compared.
        status: `ok`, `FAIL` or `skipped`.
        note: number of compared values, or the reason for skipping.
        count: number of compared values, which must not fall below the floor of the folder, see `floors`.
        lacks_weights: whether nothing was compared because the folder lacks a weight file.
    """

    quantity: str
    difference: float | None
    status: Status
    note: str = ""
    count: int = 0
    lacks_weights: bool = False


def within(quantity: str, difference: float, tolerance: float, note: str = "", *, count: int = 1) -> Line:
    """Return a line of `count` values that is `ok` up to a tolerance; a NaN difference or no values fail."""
    return Line(quantity, difference, "ok" if count and difference <= tolerance else "FAIL", note, count)


def mismatches(quantity: str, wrong: Sequence[str], note: str, *, count: int) -> Line:
    """Return a line that is `ok` if nothing of `count` values is wrong, with the first names of the wrong ones."""
    listed = f"; differ {', '.join(wrong[:MAX_LISTED])}" if wrong else ""
    return within(quantity, float(len(wrong)), 0, note + listed, count=count)


class MissingWeightsError(LookupError):
    """A recorded weight file is not in the folder, so numbers that need it cannot be compared."""


@dataclass
class Differences:
    """Largest difference and number of compared values."""

    largest: float = 0.0
    num_compared: int = 0

    def add(self, ours: Any, theirs: Any) -> None:
        """Compare two arrays of the same shape.

        Raises:
            ValueError: their shapes differ.
        """
        mine, recorded = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
        if mine.shape != recorded.shape:
            raise ValueError(f"our array has shape {mine.shape}, the recorded one {recorded.shape}")
        if mine.size:
            with np.errstate(invalid="ignore"):  # NaN and infinite values of either side give NaN, which fails
                self.largest = float(np.maximum(self.largest, np.abs(mine - recorded).max()))
        self.num_compared += mine.size

    def line(self, quantity: str, tolerance: float, what: str = "values") -> Line:
        """Return the line of the report."""
        return within(quantity, self.largest, tolerance, f"{self.num_compared} {what}", count=self.num_compared)


@dataclass
class Oracle:
    """Folder of recorded numbers.

    Attributes:
        path: path of the folder.
        compat: names of defects that may explain a recorded number, see `llava.compat`.
        contents: content of the files that were read, by name.
    """

    path: Path
    compat: frozenset[str] = frozenset(COMPAT)
    contents: dict[str, Any] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Return whether the folder has a file."""
        return (self.path / name).is_file()

    def json(self, name: str) -> Any:
        """Return the content of a JSON file, which is read once."""
        if name not in self.contents:
            self.contents[name] = json.loads((self.path / name).read_text(encoding="utf-8"))
        return self.contents[name]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays of a file, which is read once."""
        if name not in self.contents:
            with np.load(self.path / name) as arrays:
                self.contents[name] = dict(arrays)
        found: dict[str, np.ndarray] = self.contents[name]
        return found

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a JSON lines file, which is read once."""
        if name not in self.contents:
            text = (self.path / name).read_text(encoding="utf-8")
            self.contents[name] = [json.loads(line) for line in text.splitlines() if line.strip()]
        rows: list[dict[str, Any]] = self.contents[name]
        return rows

    def is_input(self, name: str) -> bool:
        """Return whether a file is an input of a model or an evaluation whose numbers are recorded here."""
        if self.has("expected_metrics.json"):
            return True
        configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in self.models]
        return any(name in config.values() for config in configs)

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows of the conversations, by id."""
        return {str(row["id"]): row for row in self.json("data.json")}

    def images(self, row: str) -> list[Image.Image]:
        """Return the images of a conversation in RGB."""
        return self.images_of(self.rows[row])

    def images_of(self, row: dict[str, Any]) -> list[Image.Image]:
        """Return the images of a row of `data.json` in RGB."""
        listed = row.get("image") or []
        names = [listed] if isinstance(listed, str) else listed
        return [Image.open(self.path / "images" / name).convert("RGB") for name in names]

    @cached_property
    def _folders(self) -> list[Path]:
        below = sorted(path.parent for path in self.path.glob("**/*config.json"))
        return list(dict.fromkeys(below))

    @cached_property
    def models(self) -> list[Path]:
        """Folders of multimodal models, with configuration and tokenizer; their weights may be missing."""
        return [folder for folder in self._folders if _is_multimodal(folder) and _holds(folder, TOKENIZERS)]

    @property
    def with_weights(self) -> list[Path]:
        """Folders of multimodal models, those with weights first."""
        return sorted(self.models, key=lambda folder: not _holds(folder, WEIGHTS))

    @cached_property
    def language_models(self) -> list[Path]:
        """Folders of plain language models, with configuration and tokenizer; their weights may be missing."""
        whole = [folder for folder in self._folders if _holds(folder, TOKENIZERS, ("config.json",))]
        return [folder for folder in whole if not _is_multimodal(folder)]

    @cached_property
    def byte_tokenizers(self) -> list[Path]:
        """Folders of a tokenizer alone."""
        alone = (path.parent for path in self.path.glob("*/tokenizer.json"))
        return sorted(folder for folder in alone if not (folder / "config.json").is_file())

    @cached_property
    def adapters(self) -> list[Path]:
        """Folders of adapters on a language model."""
        return sorted(path.parent for path in self.path.glob("**/adapter_config.json") if _is_multimodal(path.parent))

    def model(self, name: str | None = None) -> Path:
        """Return the folder of the model of recorded numbers.

        Args:
            name: end of its path, if the numbers name it.

        Raises:
            LookupError: the number of fitting models is not one.
        """
        fitting = [path for path in self.models if name is None or path.name == Path(name).name]
        fitting = [path for path in fitting if _holds(path, WEIGHTS)] or fitting
        if len(fitting) != 1:
            found = ", ".join(str(path.relative_to(self.path)) for path in self.models) or "none"
            raise LookupError(f"expected one model{f' called {name}' if name else ''}, found {found}")
        return fitting[0]

    def loaded(self, folder: Path, base: Path | None = None) -> LoadedModel:
        """Return the model of a folder, for an adapter on the language model `base`.

        Raises:
            MissingWeightsError: the folder of the model, the language model or the tower has no weights.
        """
        for needed in (folder, base):
            if needed is not None and not _holds(needed, (*WEIGHTS, *ADAPTERS)):
                where = needed.relative_to(self.path)
                raise MissingWeightsError(f"{where} holds no weights (expected one of {', '.join(WEIGHTS)})")
        if lacking := _lacking_tower(self.path, folder):
            raise MissingWeightsError(f"{lacking} holds no weights of the vision tower")
        names = [str(path.relative_to(self.path)) for path in (folder, base) if path is not None]
        return loaded_from(self.path, *names)


def _lacking_tower(oracle: Path, folder: Path) -> str | None:
    """Return the place of the tower that a configuration names if there are no weights; None if there are."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if name := config.get("mm_vision_tower_checkpoint"):
        return None if (oracle / name).is_file() else str(name)
    tower = config["mm_vision_tower"]
    return None if _holds(oracle / tower, WEIGHTS) else str(tower)


def _holds(folder: Path, *choices: tuple[str, ...]) -> bool:
    return all(any((folder / name).is_file() for name in names) for names in choices)


def _is_multimodal(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and "mm_vision_tower" in json.loads(file.read_text(encoding="utf-8"))


@cache
def loaded_from(oracle: Path, folder: str, base: str | None = None) -> LoadedModel:
    """Return a loaded checkpoint of an oracle; tower and base are relative to the oracle's folder."""
    name = json.loads((oracle / folder / "config.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {"vision_tower": str(oracle / name["mm_vision_tower"])}
    if name.get("mm_vision_tower_config"):
        parts["vision_tower_config"] = str(oracle / name["mm_vision_tower_config"])
        parts["vision_tower_checkpoint"] = str(oracle / name["mm_vision_tower_checkpoint"])
    return load_checkpoint(
        oracle / folder, base=None if base is None else str(oracle / base), dtype=torch.float32, **parts
    )
