"""Value models of PPO in a run: a head of the policy, a folder; and the schedule, which counts rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.errors import LlavaError
from llava.model.value_head import VALUE_FILE
from tests.support.rollouts import rl_arguments, rl_train, write_toy
from tests.support.runs import losses, saved
from tests.support.tiny import tiny_llava


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("kind", ["head", "folder"])
def test_a_run_with_another_value_model(parts: Path, tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        loaded = tiny_llava(seed=3)
        loaded.model.save_pretrained(tmp_path / "value")
        loaded.processor.save_pretrained(tmp_path / "value")
    value = tmp_path / "value" if kind == "folder" else "head"
    rl_train(rl_arguments(parts, tmp_path / "run", objective="ppo", value_model=value, noptepochs=2, max_steps=2,
                          num_generations=1, rollout_batch_size=4, learning_rate=1e-3, warmup_steps=2,
                          lr_scheduler_type="constant_with_warmup"))  # fmt: skip
    assert losses(tmp_path / "run", "value_loss")[0] > 0
    weights = saved(tmp_path / "run")
    assert (tmp_path / "run" / VALUE_FILE).is_file() and "linear.weight" in "".join(weights)
    # Both updates of a rollout have one rate, and the warmup counts rollouts; a log shows the rate of the next update.
    assert losses(tmp_path / "run", "learning_rate") == pytest.approx([0.0, 5e-4])


def test_a_value_model_of_another_vocabulary_is_refused(parts: Path, tmp_path: Path) -> None:
    loaded = tiny_llava(lm_sizes={})
    loaded.model.resize_token_embeddings(300)
    loaded.model.save_pretrained(tmp_path / "value")
    loaded.processor.save_pretrained(tmp_path / "value")
    with pytest.raises(LlavaError, match="a vocabulary of 300 tokens, the policy has"):
        rl_train(rl_arguments(parts, tmp_path / "run", objective="ppo", value_model=tmp_path / "value"))
