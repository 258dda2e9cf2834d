"""Values of config.json with a wrong type: one line that names the key, before anything else is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava.errors import CheckpointError
from llava.model.checkpoint.legacy_keys import check_values, unknown_keys
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.tools.inspection import inspect_checkpoint
from tests.support.legacy_folders import write_legacy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_hidden_layers", value) for value in ("2", None, -1, 10**9, True)),
        *(("hidden_size", value) for value in ("x", 0, 1.5)),
        *(("num_attention_heads", 0), ("num_key_value_heads", "x"), ("vocab_size", [1])),
        *(("mm_vision_tower", 5), ("mm_projector_type", ["linear"]), ("model_type", 5)),
        *(("mm_vision_select_layer", value) for value in (None, "-2", [-2, -1])),
        *(("mm_use_im_start_end", value) for value in ("false", 0, "")),
    ],
)
def test_wrong_types_are_rejected(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"{key} is .*; expected") as caught:
        check_values({key: value}, Path("config.json"))
    assert "\n" not in str(caught.value)


def test_values_of_published_files_are_valid() -> None:
    values = {
        "mm_vision_select_layer": -2,
        "mm_projector_type": None,
        "mm_use_im_start_end": False,
        "vocab_size": 32000,
    }
    check_values({**values, "num_key_value_heads": None, "max_sequence_length": None}, Path("config.json"))


@pytest.mark.parametrize("read", [load_checkpoint, inspect_checkpoint])
def test_everything_that_opens_a_checkpoint_stops(tmp_path: Path, read: Any) -> None:
    folder = write_legacy(tmp_path, mm_use_im_start_end="false")
    with pytest.raises(CheckpointError, match=r"config\.json: mm_use_im_start_end is 'false'; expected true or false"):
        read(folder)


@pytest.mark.parametrize("architectures", [5, None, "LlavaLlamaForCausalLM"])
def test_architectures_of_a_wrong_type_are_ignored(tmp_path: Path, architectures: Any) -> None:
    checkpoint = inspect_checkpoint(write_legacy(tmp_path, architectures=architectures)).checkpoint
    assert (checkpoint.kind, checkpoint.text_type) == ("legacy", "llama")


def test_keys_of_published_files_are_known() -> None:
    llava_15 = ("tune_mm_vision_resampler", "freeze_mm_vision_resampler", "mm_resampler_type", "max_length")
    llava_16 = ("image_crop_resolution", "image_split_resolution", "image_grid_pinpoints", "mm_patch_merge_type")
    llava_med_10 = ("sep_image_conv_front", "mm_use_im_start_end", "max_sequence_length")
    known = dict.fromkeys((*llava_15, *llava_16, *llava_med_10))
    assert unknown_keys({**known, "a_key_of_tomorrow": 1}) == ["a_key_of_tomorrow"]
