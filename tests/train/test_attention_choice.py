"""`--attn-implementation`: the attention of transformers computes the same losses, in padded rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llava.errors import ConfigError, LlavaError, MissingDependency
from llava.model.attention import use_library_attention
from llava.train import attention_choice, command
from llava.train.args import LlavaTrainingArguments
from tests.support.runs import arguments, losses, train, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def test_losses_do_not_depend_on_the_attention(parts: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("tree", "sdpa", "eager"):
        output = tmp_path / name
        train(arguments(parts, output, attn_implementation=name, max_steps=2, num_train_epochs=None))
        layout = json.loads((output / "provenance.json").read_text())["layout"]
        assert layout == ("tree" if name == "tree" else "padded")
        found[name] = losses(output)
    # Sums of float32 terms in another order; the second loss follows an update.
    assert found["sdpa"] == pytest.approx(found["tree"], rel=1e-4)
    assert found["eager"] == pytest.approx(found["tree"], rel=1e-4)


def test_a_missing_package_is_reported_before_a_model_is_loaded(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_choice, "find_spec", lambda name: None)
    words = arguments(parts, tmp_path / "out", attn_implementation="flash_attention_2")
    for run in (command.main, train):
        with pytest.raises(MissingDependency, match=r"flash-attn.*pip install 'llava\[flash\]'") as error:
            run(words)
        assert "\n" not in str(error.value)


def test_flash_attention_needs_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="computes in half precision; add --bf16 True"):
        LlavaTrainingArguments(output_dir=str(tmp_path), attn_implementation="flash_attention_2", report_to="none")


@pytest.mark.parametrize("name", ["flash", "flash_attention_3", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(LlavaError, match="expected one of tree, sdpa, eager, flash_attention_2"):
        attention_choice.check_attention(name)


def test_what_the_library_refuses_is_one_line() -> None:
    def refuse(_: Any) -> None:
        raise ImportError("FlashAttention2 has been toggled on\nbut it cannot be used")

    model = SimpleNamespace(set_attn_implementation=refuse)
    with pytest.raises(ConfigError, match="attention 'flash_attention_2' cannot be used: FlashAttention2 has") as error:
        use_library_attention(cast(Any, model), "flash_attention_2")
    assert "\n" not in str(error.value)
