"""`--bf16 auto`: measured, stored in the run, agreed between ranks; slow `--bf16 True` warns once."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from llava.errors import CheckpointError, ConfigError
from llava.model import precision as measuring
from llava.train import parsing
from llava.train.run import run_sft
from tests.support import ranks
from tests.support.runs import arguments


def use_speedup(monkeypatch: pytest.MonkeyPatch, speedup: float) -> None:
    """Set the speedup of bfloat16 over float32."""
    monkeypatch.setattr(measuring, "_measured", lambda *_: speedup)


def parse(parts: Path, out: Path, **changed: object) -> bool:
    words = arguments(parts, out, **{"bf16": None, **changed})
    return bool(parsing.parse_training_args(words, bf16="auto")[2].bf16)


@pytest.mark.parametrize(("speedup", "expected"), [(3.0, True), (1.2, False), (0.03, False)])
def test_auto_is_the_default_and_measures(
    parts: Path, tmp_path: Path, speedup: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_speedup(monkeypatch, speedup)
    assert parse(parts, tmp_path) is expected
    assert parse(parts, tmp_path, bf16="auto") is expected


@pytest.mark.parametrize(("word", "expected"), [("True", True), ("False", False), ("true", True), ("0", False)])
def test_a_given_word_is_not_measured(
    parts: Path, tmp_path: Path, word: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_speedup(monkeypatch, 0.5 if expected else 3.0)
    assert parse(parts, tmp_path, bf16=word) is expected


def test_published_commands_without_the_flag_compute_in_float32(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_speedup(monkeypatch, 3.0)
    words = arguments(parts, tmp_path, bf16=None)
    assert not parsing.parse_training_args(words)[2].bf16
    assert parsing.parse_training_args([*words, "--bf16"])[2].bf16


def test_fp16_rules_auto_out(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_speedup(monkeypatch, 3.0)
    assert parse(parts, tmp_path, fp16=True) is False


def test_another_word_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--bf16: expected True, False or auto, got 'automatic'"):
        parse(parts, tmp_path, bf16="automatic")


def test_a_resume_keeps_what_the_run_chose(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed = {"bf16": "auto", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    use_speedup(monkeypatch, 3.0)
    run_sft(arguments(parts, tmp_path, **changed))
    stored = json.loads((tmp_path / "resolved_arguments.json").read_text())["training"]
    assert stored["bf16"] is True
    assert json.loads((tmp_path / "provenance.json").read_text())["precision"] == "bfloat16"
    use_speedup(monkeypatch, 0.5)
    assert parse(parts, tmp_path) is True
    assert parse(parts, tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-1") is True
    assert parse(parts, tmp_path, overwrite_output_dir=True) is False
    assert parse(parts, tmp_path / "other") is False
    with pytest.raises(ConfigError, match=r"--bf16 True, this run has False"):
        run_sft(arguments(parts, tmp_path, **{**changed, "bf16": False, "max_steps": 2}))


def test_slow_bf16_on_a_cpu_warns_once_with_the_factor(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_speedup(monkeypatch, 0.025)
    with caplog.at_level(logging.WARNING):
        parse(parts, tmp_path, bf16=True)
        parse(parts, tmp_path, bf16=True)
    [line] = [record.message for record in caplog.records if "--bf16" in record.message]
    assert "40.0 times as long" in line and "--bf16 auto" in line


def test_fast_bf16_does_not_warn(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_speedup(monkeypatch, 3.0)
    with caplog.at_level(logging.WARNING):
        parse(parts, tmp_path, bf16=True)
    assert "--bf16" not in caplog.text


def choose(parts: Path, out: Path) -> tuple[int, bool]:
    """Return the number of ranks and the choice of this one, after different measurements."""
    speedup = 3.0 if os.environ["RANK"] == "1" else 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_measured", lambda *_: speedup)
        chosen = parse(parts, out)
    return torch.distributed.get_world_size(), chosen


def test_ranks_agree(parts: Path, tmp_path: Path) -> None:
    assert ranks.run_ranks(2, choose, parts, tmp_path) == [(2, False), (2, False)]


def test_a_resumed_bf16_run_that_is_slow_here_is_named_as_such(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed = {"bf16": "auto", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    use_speedup(monkeypatch, 3.0)
    run_sft(arguments(parts, tmp_path, **changed))
    use_speedup(monkeypatch, 0.5)
    with caplog.at_level(logging.WARNING):
        assert parse(parts, tmp_path) is True
    assert "the run to resume computes in bfloat16" in caplog.text and "--bf16 True" not in caplog.text


@pytest.mark.parametrize("content", ['{"training": {"bf16": tr', "[]", '{"training": []}'])
def test_damaged_arguments_of_an_earlier_run_are_no_traceback(
    parts: Path, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_speedup(monkeypatch, 0.5)
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / "resolved_arguments.json").write_text(content)
    if content.startswith("{") and content.endswith("}"):
        assert parse(parts, tmp_path) is False
        return
    with pytest.raises(CheckpointError, match=r"resolved_arguments\.json"):
        parse(parts, tmp_path)


HALF: list[dict[str, object]] = [
    {"fp16": True},
    {"fp16": True, "use_cpu": True},
    {"fp16": True, "bf16": "auto"},
    {"fp16": True, "bf16": False},
    {"fp16": "true", "lora_enable": True, "lora_r": 2},
]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="float16 is computed on an accelerator")
@pytest.mark.parametrize("given", HALF, ids=str)
def test_fp16_on_a_cpu_is_recorded_as_what_is_computed(
    parts: Path, tmp_path: Path, given: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    words = {"bf16": None, "max_steps": 1, **given}
    run_sft(arguments(parts, tmp_path, **words))
    assert [line for line in caplog.messages if "--fp16 True is ignored" in line] == [
        "--fp16 True is ignored: float16 needs an accelerator, so this run computes in float32 on the CPU, and its "
        "provenance says so; --bf16 auto uses bfloat16 where the CPU is faster with it"
    ]
    stored = json.loads((tmp_path / "resolved_arguments.json").read_text())["training"]
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert stored["fp16"] is False and stored["bf16"] is False
    assert provenance["precision"] == "float32" and provenance["options"]["fp16"] is False


def test_two_half_precisions_are_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="At most one of fp16 and bf16"):
        parsing.parse_training_args(arguments(parts, tmp_path, fp16=True, bf16=True))
