"""Fixtures of the tests of servers."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def tiny_options(shared: Path) -> list[str]:
    """Options of a tiny model of the oracles."""
    folder = shared / "oracles" / "llava-med-1.5-mistral"
    model, tower = folder / "llava-med-mistral-tiny", folder / "vision_tower"
    return ["--model-path", str(model.resolve()), "--vision-tower", str(tower.resolve())]
