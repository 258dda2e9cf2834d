"""Options of preference training: defaults, several losses, what is refused, and what decides a resume."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from llava.errors import ConfigError
from llava.train.parsed import Parsed
from llava.train.parsing import parse_training_args
from llava.train.preference_args import PreferenceArguments, PreferenceSpec
from llava.train.score_command import main as score_main
from tests.support.runs import arguments


def parse(tmp_path: Path, *words: str, objective: str = "dpo") -> Parsed:
    return parse_training_args([*arguments(tmp_path, tmp_path), "--objective", objective, *words])


def spec_of(tmp_path: Path, *words: str) -> PreferenceSpec:
    found = parse(tmp_path, *words).preference.spec()
    assert found is not None
    return found


def test_defaults(tmp_path: Path) -> None:
    found = spec_of(tmp_path)
    assert found.losses.names == ("sigmoid",) and found.losses.beta == 0.1
    assert found.ref_mode == "cached" and found.disable_dropout
    assert parse(tmp_path, objective="sft").preference.spec() is None
    assert PreferenceArguments().spec() is None


@pytest.mark.parametrize(
    ("words", "beta", "mode"),
    [
        (["--pref_loss", "simpo"], 2.0, "none"),
        (["--pref_loss", "simpo", "sft"], 2.0, "none"),
        (["--pref_loss", "simpo", "sigmoid"], 0.1, "cached"),
        (["--pref-loss", "simpo", "--beta", "2.5"], 2.5, "none"),
        (["--pref_loss", "ipo", "--beta", "0.3"], 0.3, "cached"),
    ],
)
def test_beta_and_reference_by_loss(tmp_path: Path, words: list[str], beta: float, mode: str) -> None:
    found = spec_of(tmp_path, *words)
    assert (found.losses.beta, found.ref_mode) == (beta, mode)


@pytest.mark.parametrize(
    "words",
    [
        "--pref_loss sigmoid bco_pair sft --pref_loss_weights 0.8 0.2 1.0",
        "--pref_loss sigmoid --pref_loss bco_pair --pref-loss=sft --pref_loss_weights=0.8,0.2 --pref_loss_weights 1.0",
        "--pref-loss sigmoid,bco_pair,sft --pref-loss-weights 0.8,0.2,1",
    ],
)
def test_several_losses(tmp_path: Path, words: str) -> None:
    losses = spec_of(tmp_path, *words.split()).losses
    assert losses.names == ("sigmoid", "bco_pair", "sft") and losses.weights == (0.8, 0.2, 1.0)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("--pref_loss dpo", "unknown preference loss 'dpo'"),
        ("--pref_loss mdpo", "need each other"),
        ("--image_negative crop", "need each other"),
        ("--pref_loss mdpo --image_negative box", "expected none, crop, noise, blank, swap"),
        ("--pref_loss mdpo --image_negative crop --feature_cache_dir x", "omit --feature-cache-dir"),
        ("--pref_loss sigmoid sigmoid", "twice"),
        ("--pref_loss sigmoid sft --pref_loss_weights 1", "names 2 losses"),
        ("--pref_loss_weights nan", "a number from 0 to"),
        ("--beta 0", "above 0"),
        ("--beta nan", "a number from 0 to"),
        ("--label_smoothing 0.5", "below 0.5"),
        ("--pref_loss kto sft", "use it alone"),
        ("--pref_loss kto --kto_weights 1", "expected two numbers"),
        ("--pref_loss kto --ref_mode none", "compares with a reference"),
        ("--simpo_gamma inf", "a number from -1e[+]30 to"),
        ("--ref_mode frozen", "expected cached, adapter_off, copy or none"),
        ("--ref_mode none", "compares with a reference"),
        ("--ref_mode copy --ref_logprobs x", "only with --ref-mode cached"),
        ("--ref_mode adapter_off", "expected --lora-enable True; or use --ref-mode cached"),
        ("--loss_normalization micro_batches", "cannot be used with --objective dpo"),
        ("--objective other", "expected one of sft, dpo, grpo"),
        ("--data_aug True", "--data-aug True is not supported"),
        ("--pretrain_lora x", "--pretrain-lora x needs --vit-lora-enable True"),
    ],
)
def test_what_is_refused(tmp_path: Path, words: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(tmp_path, *words.split())


def test_adapter_off_with_an_adapter_and_the_projector(tmp_path: Path) -> None:
    words = ["--ref_mode", "adapter_off", "--lora_enable", "True"]
    assert spec_of(tmp_path, *words).ref_mode == "adapter_off"


def test_options_without_effect_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--num_latents", "8", "--qav_loss", "True", "--loss_alpha", "0.1", "--data_aug", "False"]
    with caplog.at_level(logging.WARNING):
        parse(tmp_path, *words, "--beta", "0.2", objective="sft")
    lines = [record.message for record in caplog.records if "without effect" in record.message]
    assert len(lines) == 2 and "--beta; they need --objective dpo" in lines[1]
    assert all(name in lines[0] for name in ("num-latents", "qav-loss", "loss-alpha"))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--pref_loss hinge", "pref_loss"),
        ("--pref_loss_weights 0.5", "pref_loss_weights"),
        ("--beta 0.2", "beta"),
        ("--label_smoothing 0.1", "label_smoothing"),
        ("--simpo_gamma 0.5", "simpo_gamma"),
        ("--orpo_lambda 0.5", "orpo_lambda"),
        ("--anchor_delta 0.5", "anchor_delta"),
        ("--ref_mode copy", "ref_mode"),
        ("--disable_dropout False", "disable_dropout"),
        ("--pref_loss kto --kto_weights 1 2", "kto_weights"),
        ("--compat policy_dropout", "disable_dropout"),
        ("--compat policy_reference_inputs", "ref_mode"),
        ("--pref_loss mdpo --image_negative blank", "image_negative"),
        ("--objective sft", "objective"),
    ],
)
def test_every_option_decides_a_resume(tmp_path: Path, words: str, name: str) -> None:
    plain: dict[str, Any] = parse(tmp_path).decisive_options()
    assert plain[name] != parse(tmp_path, *words.split()).decisive_options()[name]


def test_a_file_of_log_probabilities_counts_by_its_content(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path, text in zip(files, "xxy", strict=True):
        path.write_text(text)
    same, moved, other = (parse(tmp_path, "--ref_logprobs", str(file)).decisive_options() for file in files)
    assert same == moved and same["ref_logprobs"] != other["ref_logprobs"]
    with pytest.raises(ConfigError, match=r"--ref-logprobs .*: cannot be read"):
        parse(tmp_path, "--ref_logprobs", str(tmp_path / "none")).decisive_options()


def test_no_file_holds_the_reference_of_kto(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "x.jsonl"), *arguments(tmp_path, tmp_path), "--pref_loss", "kto"]
    with pytest.raises(ConfigError, match="no file can hold them"):
        score_main(words)


def test_scoring_takes_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("pref_loss: kto\n")
    words = ["run.yaml", "--out", str(tmp_path / "x.jsonl"), *arguments(tmp_path, tmp_path)]
    with pytest.raises(ConfigError, match="no file can hold them"):
        score_main([str(tmp_path / words[0]), *words[1:]])
    (tmp_path / "run.yaml").write_text("pref_los: kto\n")
    with pytest.raises(ConfigError, match="unknown option pref_los; did you mean --pref-loss"):
        score_main([str(tmp_path / words[0]), *words[1:]])
