"""Folders of recorded numbers: their files and models, found by content."""

from __future__ import annotations

import json
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

IMAGE_MARK = -200
"""Token id of an image placeholder in the originals."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.model", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Line:
    """Compared quantity of the report.

    Attributes:
        quantity: name of the quantity.
        difference: largest difference; None if nothing could be compared.
        status: `ok`, `FAIL` or `skipped`.
        note: number of compared values, or the reason for skipping.
    """

    quantity: str
    difference: float | None
    status: Status
    note: str = ""


def within(quantity: str, difference: float, tolerance: float, note: str = "") -> Line:
    """Return a line that is `ok` up to a tolerance (a NaN difference fails)."""
    return Line(quantity, difference, "ok" if difference <= tolerance else "FAIL", note)


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
            self.largest = float(np.fmax(self.largest, np.abs(mine - recorded).max()))
            if np.isnan(mine).any():
                self.largest = float("nan")
        self.num_compared += mine.size


@dataclass
class Oracle:
    """Folder of recorded numbers.

    Attributes:
        path: path of the folder.
        compat: names of defects that may explain a recorded number, see `llava.compat`.
    """

    path: Path
    compat: frozenset[str] = frozenset(COMPAT)
    _json: dict[str, Any] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Return whether the folder has a file."""
        return (self.path / name).is_file()

    def json(self, name: str) -> Any:
        """Return the content of a JSON file, which is read once."""
        if name not in self._json:
            self._json[name] = json.loads((self.path / name).read_text(encoding="utf-8"))
        return self._json[name]

    def arrays(self, name: str) -> Any:
        """Return the arrays of a file."""
        return np.load(self.path / name)

    def is_input(self, name: str) -> bool:
        """Return whether a file is an input of a model or an evaluation whose numbers are recorded here."""
        if self.has("expected_metrics.json"):
            return True
        configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in self.models]
        return any(name in config.values() for config in configs)

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows of the conversations, by id."""
        return {row["id"]: row for row in self.json("data.json")}

    def images(self, row: str) -> list[Image.Image]:
        """Return the images of a conversation in RGB."""
        listed = self.rows[row].get("image") or []
        names = [listed] if isinstance(listed, str) else listed
        return [Image.open(self.path / "images" / name).convert("RGB") for name in names]

    @cached_property
    def _folders(self) -> list[Path]:
        below = sorted(path.parent for path in self.path.glob("**/*config.json"))
        return list(dict.fromkeys(below))

    @cached_property
    def models(self) -> list[Path]:
        """Folders of complete multimodal models, with configuration, weights and tokenizer."""
        return [folder for folder in self._folders if _is_multimodal(folder) and _holds(folder, WEIGHTS, TOKENIZERS)]

    @cached_property
    def language_models(self) -> list[Path]:
        """Folders of plain language models."""
        whole = [folder for folder in self._folders if _holds(folder, WEIGHTS, TOKENIZERS)]
        return [folder for folder in whole if not _is_multimodal(folder)]

    @cached_property
    def byte_tokenizers(self) -> list[Path]:
        """Folders of a tokenizer alone."""
        return sorted(path.parent for path in self.path.glob("*/tokenizer.json") if not _holds(path.parent, WEIGHTS))

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
        if len(fitting) != 1:
            found = ", ".join(str(path.relative_to(self.path)) for path in self.models) or "none"
            raise LookupError(f"expected one model{f' called {name}' if name else ''}, found {found}")
        return fitting[0]


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
