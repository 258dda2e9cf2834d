"""A run resumed between two logs repeats the second log exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.runs import arguments, losses, train, write_parts


def test_resumed_between_two_logs(tmp_path: Path) -> None:
    """The mean that step 4 logs includes step 3, which was computed before the interruption."""
    parts, whole = write_parts(tmp_path / "parts"), tmp_path / "whole"
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    train(arguments(parts, whole, **options))
    for after in (2, 3):  # in the middle of an epoch and at its end
        broken = Path(shutil.copytree(whole, tmp_path / f"broken-{after}"))
        for step in range(after + 1, 7):
            shutil.rmtree(broken / f"checkpoint-{step}")
        train(arguments(parts, broken, **options))
        assert losses(broken) == losses(whole) and len(losses(whole)) == 3
