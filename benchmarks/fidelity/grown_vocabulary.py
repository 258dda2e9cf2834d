"""LLaVA-Med 1.0's language model as it was when a recorded run began: with the words that the run had added.

base_llm/ + rows of [PAD], <im_patch>, <im_start>, <im_end> --> a folder for --model_name_or_path
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llava.constants import IM_END_TOKEN, IM_PATCH_TOKEN, IM_START_TOKEN
from llava.model.checkpoint.load_parts import read_tensors

INPUT, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADDED_FILE = "added_tokens.json"
WEIGHTS_FILE = "pytorch_model.bin"


def is_grown(final: Path) -> bool:
    """Whether the run that saved this folder added words to the vocabulary."""
    return (final / ADDED_FILE).is_file()


class Start:
    """Starting tables of a run.

    New rows start at the mean of the rows before them, but for the patch token's, which were random. Its input row
    never changes, since features stand in its place, so it is the saved one. Its head row changes in a full training:
    the saved one is a first guess, and `correct` moves the guess by as much as the run missed the saved row.

    Args:
        base: the language model without the words.
        final: what the run saved.
    """

    def __init__(self, base: Path, final: Path) -> None:
        self.base, self.final = base, final
        self.words: dict[str, int] = json.loads((final / ADDED_FILE).read_text(encoding="utf-8"))
        self.saved = read_tensors(final / WEIGHTS_FILE)
        self.patch = self.words[IM_PATCH_TOKEN]
        self.head_row = self.saved[HEAD][self.patch].clone()

    def write(self, target: Path) -> Path:
        """Write the folder."""
        weights = read_tensors(self.base / WEIGHTS_FILE)
        weights[INPUT] = self._grown(weights[INPUT], self.saved[INPUT][self.patch])
        weights[HEAD] = self._grown(weights[HEAD], self.head_row)
        target.mkdir()
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((self.base / "config.json").read_text(encoding="utf-8"))
        config["vocab_size"] = len(weights[INPUT])
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for name in ("tokenizer.model", "special_tokens_map.json"):
            shutil.copyfile(self.base / name, target / name)
        settings = json.loads((self.base / "tokenizer_config.json").read_text(encoding="utf-8"))
        plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
        settings["added_tokens_decoder"] = {str(row): {"content": word, **plain} for word, row in self.words.items()}
        (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return target

    def _grown(self, table: Tensor, patch_row: Tensor) -> Tensor:
        for row in range(len(table), self.patch):
            table = torch.cat([table, table[:row].mean(dim=0, keepdim=True)])
        table = torch.cat([table, patch_row[None]])
        mean = table.mean(dim=0, keepdim=True)
        return torch.cat([table, mean.expand(len({IM_START_TOKEN, IM_END_TOKEN} & set(self.words)), -1)])

    def correct(self, trained: Mapping[str, Tensor]) -> float:
        """Move the guess; returns by how much at most (0 where the head was not trained)."""
        if HEAD not in trained:
            return 0.0
        missed = self.saved[HEAD][self.patch] - trained[HEAD][self.patch]
        self.head_row = self.head_row + missed
        return float(missed.abs().max())
