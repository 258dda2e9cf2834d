"""Options of reinforcement learning: checks, names of the original command, and what has no effect."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.symbolic import cue_lists
from llava.symbolic.cue_lists import EXTRACTOR_VERSION
from llava.train.parsing import Parsed, parse_training_args
from llava.train.rollout_args import WITHOUT_EFFECT, rules_label
from llava.train.rollout_names import translated
from tests.support.rollouts import PHRASES, TOY


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    (tmp_path / "phrases.yaml").write_text(PHRASES)
    (tmp_path / "rules.yaml").write_text(TOY)
    return tmp_path / "rules.yaml"


def parse(rules: Path, *words: str, objective: str = "grpo") -> Parsed:
    fixed = [
        "--model_name_or_path",
        "m",
        "--data_path",
        "d",
        "--output_dir",
        str(rules.parent / "out"),
        "--bf16",
        "False",
    ]
    return parse_training_args([*fixed, "--objective", objective, "--rules", str(rules), *words])


@pytest.mark.parametrize(("objective", "size", "kl", "high"), [("grpo", 8, 0.0, 0.28), ("rloo", 8, 0.05, 0.2),
                                                              ("ppo", 1, 0.1, 0.2)])  # fmt: skip
def test_defaults(rules: Path, objective: str, size: int, kl: float, high: float) -> None:
    spec = parse(rules, objective=objective).rollout_spec()
    assert spec is not None
    assert (spec.algorithm, spec.group_size, spec.kl_coef, spec.clip_low, spec.clip_high) == (
        objective,
        size,
        kl,
        0.2,
        high,
    )
    assert (spec.rollout_batch, spec.step_batch, spec.updates) == (64, 64, 1)


@pytest.mark.parametrize(("words", "message"), [
    (["--num_generations", "1"], "a group of one dialogue has no advantage"),
    (["--top_p", "0.9"], "another distribution"),
    (["--top_k", "50"], "another distribution"),
    (["--temperature", "0"], "--temperature is 0.0; expected a number above 0"),
    (["--rollout_batch_size", "60"], "not a multiple of --num-generations 8"),
    (["--rollout_batch_size", "64", "--step_batch_size", "24"], "--rollout-batch-size 64 is not a multiple of --step"),
    (["--noptepochs", "0"], "--noptepochs is 0; expected a number from 1"),
    (["--styles", "wild"], "unknown style 'wild'"),
    (["--preset", "none"], "unknown preset 'none'"),
    (["--aggregation", "mean"], "--aggregation is 'mean'; expected token or sequence or constant"),
    (["--value_model", "nowhere"], "no such folder; expected adapter, head or a folder"),
    (["--kl_coef", "nan"], "--kl-coef is nan; expected a number from 0"),
    (["--gamma", "1.5"], "--gamma is 1.5; expected a number from 0 to 1"),
    (["--kl_target", "1"], "--kl-target 1 adapts the KL penalty of the reward, but grpo has its own"),
    (["--init_value_with_reward", "True"], "got --objective grpo and no path"),
    (["--compat", "drllava"], "but --objective is grpo; leave it out, or use --objective ppo"),
])  # fmt: skip
def test_wrong_values(rules: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(rules, *words)


@pytest.mark.parametrize(("words", "message"), [
    (["--dynamic_sampling", "4"], "--dynamic-sampling 4 replaces groups .* but ppo has no groups"),
    (["--init_value_with_reward", "True"], "got --objective ppo and no path"),
    (["--shuffled_rewards", "True"], "shuffles within a group, but --num-generations is 1"),
    (["--kl_target", "6", "--kl_coef", "0"], "--kl-target 6 adapts --kl-coef, which stays 0"),
])  # fmt: skip
def test_wrong_values_of_ppo(rules: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(rules, *words, objective="ppo")


def test_the_published_form_is_that_of_ppo(rules: Path) -> None:
    spec = parse(rules, "--compat", "drllava", objective="ppo").rollout_spec()
    assert spec is not None and spec.published
    with pytest.raises(ConfigError, match=r"--compat drllava is .* but --objective is rloo"):
        parse(rules, "--compat", "drllava", objective="rloo")


def test_rules_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--objective ppo needs --rules FILE; expected a rule file or bone-marrow"):
        parse_training_args(["--model_name_or_path", "m", "--data_path", "d", "--objective", "ppo", "--bf16", "False"])


def test_names_of_the_original_command() -> None:
    words = ["--dataset_path", "d", "--total_epochs=3", "--base_model_name", "base", "--policy_model_name_or_path", "p"]
    assert translated(words) == ["--data_path", "d", "--num_train_epochs=3", "--model_name_or_path", "p"]
    assert translated(["--base_model_name", "base", "--x", "1"]) == ["--model_name_or_path", "base", "--x", "1"]
    assert translated(["--resume_from_training", "True"]) == []
    assert translated(["--resume_from_training=False"]) == ["--resume_from_checkpoint", "False"]


VALUES = {"reward_base_model_name": "m", "reward_model_name_or_path": "m", "reward_model_per_device_batch_size": "8",
          "reward_prompt_file": "p.txt", "length_bonus_score": "-10", "correct_bonus_score": "2",
          "clean_tokens_after_eos": "True"}  # fmt: skip


def test_what_has_no_effect_is_one_warning(rules: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert VALUES.keys() == set(WITHOUT_EFFECT)
    with caplog.at_level(logging.WARNING):
        parse(rules, *(word for name, value in VALUES.items() for word in (f"--{name}", value)), objective="ppo")
    [message] = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert all("--" + name.replace("_", "-") in message for name in WITHOUT_EFFECT)


def test_a_reward_model_starts_the_value_model(rules: Path) -> None:
    words = ["--init_value_with_reward", "True", "--reward_model_name_or_path", str(rules.parent)]
    spec = parse(rules, *words, objective="ppo").rollout_spec()
    assert spec is not None and spec.value_model == str(rules.parent)


def test_other_objectives_name_options_without_effect(rules: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse(rules, "--noptepochs", "2", objective="sft")
    assert "accepted without effect: --rules, --noptepochs; they need --objective grpo, rloo or ppo" in caplog.text


def test_beta_is_another_name_of_kl_coef(rules: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = parse(rules, "--beta", "0.04").rollout_spec()
    assert spec is not None and spec.kl_coef == 0.04 and "without effect" not in caplog.text


def test_a_changed_rule_file_is_another_run(rules: Path) -> None:
    before = parse(rules).decisive_options()
    (rules.parent / "phrases.yaml").write_text(PHRASES.replace("Dark?", "Is this dark?"))
    after = parse(rules).decisive_options()
    assert before["rules"] != after["rules"] and before | {"rules": ""} == after | {"rules": ""}


def test_another_reading_is_another_run(rules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [rules_label(str(rules))]
    monkeypatch.setattr("llava.train.rollout_args.EXTRACTOR_VERSION", EXTRACTOR_VERSION + 1)
    labels.append(rules_label(str(rules)))
    changed = (cue_lists.CUES / "en.yaml").read_text(encoding="utf-8").replace("- without\n", "- without\n  - sans\n")
    (tmp_path / "en.yaml").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(cue_lists, "CUES", tmp_path)
    labels.append(rules_label(str(rules)))
    assert len(set(labels)) == 3 and f", extractor {EXTRACTOR_VERSION}, cues sha256 " in labels[0]


def test_the_batches_of_fine_tuning_are_no_decision(rules: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        plain = parse(rules, "--step_batch_size", "32")
    assert "not used in reinforcement learning" not in caplog.text
    words = ["--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "5"]
    with caplog.at_level(logging.INFO):
        other = parse(rules, "--step_batch_size", "32", *words)
    assert plain.provenance_spec() == other.provenance_spec() and plain.provenance_spec().global_batch == 32
    assert [text for text in caplog.messages if "not used" in text] == [
        "not used in reinforcement learning: --per-device-train-batch-size, --gradient-accumulation-steps; "
        "--step-batch-size sets the batch"
    ]
    assert parse(rules, *words, objective="sft").provenance_spec().global_batch == 15


def test_sizes_of_a_process_are_no_decision(rules: Path) -> None:
    words = ["--rollout_per_device_batch_size", "4", "--step_per_device_batch_size", "8"]
    assert parse(rules, *words).decisive_options() == parse(rules).decisive_options()
