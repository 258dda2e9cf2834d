"""Value models of PPO in a run: a head of the policy, a folder; and the schedule, which counts rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.errors import ConfigError, LlavaError
from llava.model.value_head import VALUE_FILE, ActorCritic, save_value
from llava.train.rollout.value import make_critic
from llava.train.specs import PartsSpec
from tests.support.rollouts import rl_arguments, rl_train, spec, write_toy
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model."""
    loaded = tiny_llava(seed=3)
    loaded.model.save_pretrained(tmp_path / "value")
    loaded.processor.save_pretrained(tmp_path / "value")
    return tmp_path / "value"


PARTS = PartsSpec(
    lora=None, tower_lora=None, projector_only=False, freeze_backbone=True, freeze_projector=True, train_tower=False,
    checkpoints_activations=False,
)  # fmt: skip


def critic_of(folder: Path) -> ActorCritic:
    return make_critic(tiny_llava(seed=3).model, spec("ppo", value_model=str(folder)), PARTS)


def test_the_head_of_a_reward_model_starts_the_value_model(folder: Path) -> None:
    value = critic_of(folder).value
    assert value is not None and not any(weight.any() for weight in value.head_state().values())
    trained = {name: torch.rand_like(weight) for name, weight in value.head_state().items()}
    save_value(trained, folder)
    started = critic_of(folder).value
    assert started is not None and started.head_state().keys() == trained.keys()
    assert all(torch.equal(weight, trained[name]) for name, weight in started.head_state().items())


def test_the_value_model_of_another_run_is_refused(folder: Path) -> None:
    save_value({"linear.weight": torch.zeros(1, 8)}, folder)
    with pytest.raises(ConfigError, match="the folder of --objective reward"):
        critic_of(folder)


def test_a_value_model_of_another_vocabulary_is_refused(parts: Path, tmp_path: Path) -> None:
    loaded = tiny_llava(lm_sizes={})
    loaded.model.resize_token_embeddings(300)
    loaded.model.save_pretrained(tmp_path / "value")
    loaded.processor.save_pretrained(tmp_path / "value")
    with pytest.raises(LlavaError, match="a vocabulary of 300 tokens, the policy has"):
        rl_train(rl_arguments(parts, tmp_path / "run", objective="ppo", value_model=tmp_path / "value"))
