"""Rollouts that a server samples: those of the policy as it starts, with ratios to the server's log-probabilities."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llava.errors import LlavaError
from llava.generation.loading import open_engine
from llava.serve.admission import Admission
from llava.serve.answering import AnswerService
from llava.serve.gate import GateSettings
from llava.serve.image_inputs import ImageLimits
from llava.serve.worker import make_worker_app, served_model
from tests.support.rollouts import rl_arguments, rl_train, rollouts, write_toy
from tests.support.runs import metrics
from tests.support.served import served
from tests.support.tiny import tiny_llava


def test_a_server_with_the_same_weights_samples_the_same_dialogues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = write_toy(tmp_path / "toy")
    loaded = tiny_llava(seed=3, template="vicuna_v1")
    start = tmp_path / "start"
    loaded.model.save_pretrained(start)
    loaded.processor.save_pretrained(start)
    engine = open_engine(str(start), device="cpu", dtype="float32", prefill_chunk=512, prefix_cache_mb=8)
    service = AnswerService(
        engine, served_model(engine, str(start), "other"), admission=Admission(), images=ImageLimits()
    )
    options = {"model_name_or_path": start, "vision_tower": None, "version": None, "max_steps": 1}
    rl_train(rl_arguments(parts, tmp_path / "local", **options))
    app = make_worker_app(service, GateSettings(), engine.processor.tokenizer)
    with served(app) as url, caplog.at_level(logging.WARNING):
        rl_train(rl_arguments(parts, tmp_path / "remote", engine=url, **options))
        moved = {**options, "max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        rl_train(rl_arguments(parts, tmp_path / "moved", engine=url, **moved))
    same, different = (line["engine_difference"] for line in metrics(tmp_path / "moved")[:2])
    assert same < 1e-4 < different  # the policy learned, the server did not
    ours, theirs = rollouts(tmp_path / "local"), rollouts(tmp_path / "remote")
    for name in ("case", "seed", "asked", "answers", "finishes", "total"):
        assert [row[name] for row in theirs] == [row[name] for row in ours]
    for own, found in zip(ours, theirs, strict=True):
        for mine, their in zip(own["logprobs"], found["logprobs"], strict=True):
            assert their == pytest.approx(mine, abs=1e-4)
    lines = [metrics(tmp_path / name)[0] for name in ("local", "remote")]
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], abs=1e-4)
    assert any(
        "samples the dialogues with the fixed weights of other" in record.getMessage() for record in caplog.records
    )
    with pytest.raises(LlavaError, match="does not answer"):
        rl_train(rl_arguments(parts, tmp_path / "gone", engine=url, **options))
    assert not (tmp_path / "gone" / "rollouts.jsonl").exists()
