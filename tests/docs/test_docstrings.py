"""Examples in docstrings: every one that the package contains runs."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest

from llava.generation.protocol import Prompt
from llava.model.checkpoint.save import save_model
from llava.samples import Conversation, Turn
from tests.support.tiny import tiny_image, tiny_llava, write_tiny_lm, write_tiny_tower, write_tiny_vqa

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "llava").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Names that the examples use."""
    folder = tmp_path_factory.mktemp("names")
    loaded = tiny_llava(seed=3)
    save_model(loaded.model, loaded.processor, folder / "model")
    write_tiny_vqa(folder / "vqa")
    return {
        "model_folder": str(folder / "model"),
        "lm_folder": str(write_tiny_lm(folder / "lm")),
        "tower_folder": str(write_tiny_tower(folder / "tower")),
        "new_folder": folder / "new",
        "rows_file": folder / "vqa" / "train.json",
        "image_folder": folder / "vqa" / "images",
        "image": tiny_image(0),
        "model": loaded.model,
        "processor": loaded.processor,
        "prompt": Prompt(Conversation((Turn("human", "Hello"),))),
    }


def test_the_public_modules_have_examples() -> None:
    assert {"llava.api", "llava.samples", "llava.conversation", "llava.scoring.metrics", "llava.data.encode"} <= set(
        MODULES
    )


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert found.attempted and not found.failed, capsys.readouterr().out
