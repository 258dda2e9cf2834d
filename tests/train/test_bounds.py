"""Numbers that no run can have are refused by the name of their option, before torch, a model or rows."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.train.bounds import BOUNDS, Bound, check_bounds
from llava.train.command import checked_words
from llava.train.option_table import read_table
from llava.utils.cli import flag

ROOT = Path(__file__).parents[2]
NUMERIC = {row.name.removeprefix("--").replace("-", "_"): row for row in read_table() if row.kind in ("int", "float")}
OF_THE_LAUNCHER = {"nproc", "nnodes", "node_rank"}
"""Options that `torchrun_command` checks."""

ODD = {
    "save_total_limit": ["-1", "0"],
    "adam_beta1": ["1", "-0.1", "nan", "1.5"],
    "adam_beta2": ["1", "-1", "nan", "inf"],
    "adam_epsilon": ["0", "-1e-8", "nan", "1e-320", "inf"],
    "warmup_ratio": ["nan", "2", "-0.1", "inf"],
    "warmup_steps": ["nan", "-1", "1.5", "inf"],
    "weight_decay": ["nan", "-1", "inf", "1e31"],
    "lora_r": ["0", "-1", "9" * 40],
    "lora_dropout": ["2", "1", "-0.5", "nan"],
    "lora_alpha": ["0", "-16"],
    "lora_r_vit": ["0", "-1"],
    "lora_alpha_vit": ["0"],
    "lora_dropout_vit": ["1", "nan"],
    "max_grad_norm": ["-1", "nan", "inf"],
    "gradient_accumulation_steps": ["0", "-4"],
    "dataloader_num_workers": ["-1", "99999"],
    "dataloader_prefetch_factor": ["0", "-2"],
    "logging_steps": ["0", "-1", "nan", "2.5", "inf"],
    "eval_steps": ["0", "-1", "nan", "1.5"],
    "save_steps": ["0", "-5", "nan", "inf"],
    "model_max_length": ["1", "0", "-1", str(2**31)],
    "image_size": ["0", "-224", "100000"],
    "learning_rate": ["inf", "-1", "nan", "1e38"],
    "mm_projector_lr": ["nan", "-1e-3", "inf"],
    "seed": ["-1", str(2**32), "9" * 400],
    "num_train_epochs": ["0", "inf", "-3", "nan"],
    "max_steps": ["0", "-2"],
    "per_device_train_batch_size": ["0", "-1"],
    "max_tokens_per_row": ["0"],
    "feature_cache_gb": ["nan", "-1", "inf"],
    "eval_delay": ["nan", "-1"],
    "temperature": ["0", "nan"],
    "beta": ["-1", "nan", "inf"],
    "ddp_timeout": ["0", "-1"],
    "master_port": ["-1", "70000"],
}


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Command line whose files do not exist: numbers are checked before them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    return ["--model-name-or-path", "./lm", "--vision-tower", "./tower", "--data-path", "rows.json"]


def test_every_numeric_option_has_bounds() -> None:
    assert set(BOUNDS) == set(NUMERIC) - OF_THE_LAUNCHER


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_no_numeric_option_takes_a_number_that_is_none(line: list[str], name: str) -> None:
    row = NUMERIC[name]
    values = ["nan", "inf", "1e999"] if row.kind == "float" else ["9" * 60, "-" + "9" * 60]
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{flag(name)} is .*; expected a number ") as caught:
            checked_words([*line, f"{row.name}={value}"])
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ODD.items() for value in values])
def test_an_odd_number_is_refused_with_option_value_and_bounds(line: list[str], name: str, value: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{flag(name)} is .*; expected a number (from|above) [-\d.e]+ to "
    ) as caught:
        checked_words([*line, f"{flag(name)}={value}"])
    shown = str(float(value)) if NUMERIC[name].kind == "float" else value if len(value) < 30 else "digits"
    assert f" {shown};" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in sorted(BOUNDS) if NUMERIC[name].default is not None])
def test_defaults_are_in_their_bounds(name: str) -> None:
    check_bounds({name: NUMERIC[name].default})


PUBLISHED = {
    "save_total_limit": (1, 3, 100_000), "warmup_ratio": (0, 0.03, 0.05), "weight_decay": (0.0, 0.1),
    "learning_rate": (0, 2e-5, 1e-3), "mm_projector_lr": (0, 2e-5), "model_max_length": (512, 2048, 4096),
    "logging_steps": (1, 1.0, 0.1), "save_steps": (50_000, 2400, 0.5), "dataloader_num_workers": (0, 4, 8),
    "lora_r": (4, 64, 128), "lora_alpha": (16, 256), "lora_dropout": (0, 0.05), "max_steps": (-1, 1, 20_000),
    "max_grad_norm": (0, 1.0), "num_train_epochs": (1, 3, 0.5), "adam_epsilon": (1e-8, 1e-6), "local_rank": (-1, 0),
    "adam_beta1": (0, 0.9), "adam_beta2": (0.95, 0.999), "warmup_steps": (0, 0.03, 100), "seed": (0, 42),
    "eval_steps": (None, 0.25, 500), "pref_loss_weights": ([1.0, 0.5], None), "image_size": (None, 224, 518),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_numbers_of_published_commands_are_allowed(name: str) -> None:
    for value in PUBLISHED[name]:
        check_bounds({name: value})


@pytest.mark.parametrize(
    ("bound", "value", "is_allowed"),
    [
        (Bound(0, 1), 0, True),
        (Bound(0, 1), 1, True),
        (Bound(0, 1, above=True), 0, False),
        (Bound(0, 1, below=True), 1, False),
        (Bound(0, 1, below=True), math.nextafter(1, 0), True),
        (Bound(1, 9, other=-1), -1, True),
        (Bound(1, 9, other=-1), 0, False),
        (Bound(0, 9, whole=True), 0.5, True),
        (Bound(0, 9, whole=True), 2.5, False),
        (Bound(0, 9), math.nan, False),
    ],
)
def test_bounds(bound: Bound, value: float, is_allowed: bool) -> None:
    assert bound.allows(value) is is_allowed


def test_the_option_classes_check_as_the_command_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lora-r is 0; expected a number from 1 to 1000000"):
        ModelArguments(model_name_or_path="lm", lora_r=0)
    with pytest.raises(ConfigError, match=r"--feature-cache-gb is nan; expected a number from 0 to 1000000000"):
        DataArguments(data_path="rows.json", feature_cache_gb=math.nan)
    with pytest.raises(ConfigError, match=r"--adam-beta1 is 1\.0; expected a number from 0 to below 1"):
        LlavaTrainingArguments(output_dir=str(tmp_path), adam_beta1=1.0)


def test_a_refused_number_is_one_line_without_torch(tmp_path: Path) -> None:
    words = ["train", "--model-name-or-path", "./lm", "--data-path", "rows.json", "--lora-dropout", "2"]
    program = (
        "import sys\nfrom llava.cli import main\nfrom llava.utils.cli import run_program\n"
        f"try:\n    run_program(lambda: main({words!r}))\n"
        "finally:\n    assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "llava: error: --lora-dropout is 2.0; expected a number from 0 to below 1\n"
