"""The precision of a quickstart is measured by its first stage and stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.errors import DataError
from llava.quickstart import stages
from llava.quickstart.settings import QuickstartSettings
from llava.quickstart.stages import Context


def test_the_stored_precision_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(QuickstartSettings(tmp_path), {"parts": {"lm": "lm", "training_dtype": "bfloat16"}})
    monkeypatch.setattr(stages, "trains_faster_in_bf16", lambda *_: False)
    assert stages.precision_of(context) == "bfloat16"
    del context.facts["parts"]["training_dtype"]  # a run of an earlier version
    assert stages.precision_of(context) == "float32"


def test_a_test_row_without_an_answer_is_named_before_any_model_is_built(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    row = '{"id": 7, "conversations": [{"from": "human", "value": "What?"}]}'
    (tmp_path / "test.json").write_text(f"[{row}]")
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(DataError, match="row 0"):
        stages.data(Context(QuickstartSettings(tmp_path / "out", data=tmp_path)))
