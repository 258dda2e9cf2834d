"""Marker embedding rows in a projector file: they are written where the vocabulary has the two tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.checkpoint.tools.merge_lora import merge_lora
from llava.model.checkpoint.weight_names import EMBEDDINGS
from llava.tokenization import token_id
from tests.support.legacy_folders import projector_weights, random_tensor, write_legacy, write_projector_only

ROWS = random_tensor((2, 32), 4)
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def write_two_rows(root: Path, **options: Any) -> Path:
    """Write a projector trained with the markers, with only their two rows."""
    folder = write_projector_only(root, mm_use_im_start_end=True, **options)
    torch.save({**projector_weights("mlp2x_gelu"), TABLES[0]: ROWS}, folder / "mm_projector.bin")
    return folder


def pad_base(folder: Path, num_rows: int) -> None:
    """Add unused rows to a language model's tables, as many published ones have."""
    state = load_file(folder / "model.safetensors")
    state |= {name: torch.cat([state[name], random_tensor((num_rows, 32), 8)]) for name in TABLES}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("num_free_rows", [0, 1, 9])
@pytest.mark.parametrize("has_patch_token", [False, True])
def test_two_rows_are_those_of_the_tokens(tmp_path: Path, num_free_rows: int, has_patch_token: bool) -> None:
    folder = write_two_rows(tmp_path, mm_use_im_patch_token=has_patch_token)
    pad_base(tmp_path / "lm", num_free_rows)
    loaded = load_checkpoint(folder, base=str(tmp_path / "lm"))
    first = 261 + has_patch_token
    ids = [token_id(loaded.processor.tokenizer, word) for word in ("<im_start>", "<im_end>")]
    assert ids == loaded.model.config.marker_token_ids == [first, first + 1]
    assert torch.equal(loaded.model.state_dict()[EMBEDDINGS][first : first + 2], ROWS)
    convert_checkpoint(folder, tmp_path / "ours", "ours", LoadOptions(base=str(tmp_path / "lm")))
    merge_lora(folder, str(tmp_path / "lm"), tmp_path / "merged")
    for path in ("ours", "merged"):
        again = load_checkpoint(tmp_path / path, vision_tower=str(tmp_path / "tower") if path == "merged" else None)
        assert torch.equal(again.model.state_dict()[EMBEDDINGS], loaded.model.state_dict()[EMBEDDINGS]), path


def test_a_base_that_has_the_markers_keeps_its_size(tmp_path: Path) -> None:
    """The base of LLaVA-Med 1.0 has the tokens in its vocabulary: the rows replace its own."""
    base = write_legacy(tmp_path, style="patch_token", projector="linear", tower_inside=False, name="base")
    folder = tmp_path / "stage1"
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    torch.save({**projector_weights("linear"), TABLES[0]: ROWS}, folder / "mm_projector.bin")
    table = load_checkpoint(folder, base=str(base)).model.state_dict()[EMBEDDINGS]
    assert table.shape == (264, 32)
    assert torch.equal(table[262:], ROWS)


def test_without_the_key_the_vocabulary_has_the_patch_token(tmp_path: Path) -> None:
    """An absent `mm_use_im_patch_token` means true, in every style."""
    folder = write_legacy(tmp_path)
    config = Checkpoint.open(folder).config
    assert token_id(load_checkpoint(folder).processor.tokenizer, "<im_patch>") is None
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "mm_use_im_patch_token"})
    )
    loaded = load_checkpoint(folder)
    assert loaded.model.state_dict()[EMBEDDINGS].shape == (263, 32)
    words = [token_id(loaded.processor.tokenizer, word) for word in ("<im_patch>", "<image>")]
    assert words == [261, 262]
