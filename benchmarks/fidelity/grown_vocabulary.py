"""Language model of LLaVA-Med 1.0 at the start of a recorded run, with the tokens that the run added.

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
    """Return whether the run that saved this folder added tokens to the vocabulary."""
    return (final / ADDED_FILE).is_file()


class Start:
    """Embedding and output weights at the start of a run.

    New rows start at the mean of the rows before them, except those of the patch token, which were random. Its input
    row never changes, because image features replace it, so it is the saved one. Its output row changes in a full
    training: the saved row is the first guess, and `correct` moves the guess by the error of the run.

    Args:
        base: the language model without the added tokens.
        final: folder that the run saved.
    """

    def __init__(self, base: Path, final: Path) -> None:
        self.base, self.final = base, final
        self.words: dict[str, int] = json.loads((final / ADDED_FILE).read_text(encoding="utf-8"))
        self.saved = read_tensors(final / WEIGHTS_FILE)
        self.patch = self.words[IM_PATCH_TOKEN]
        self.head_row = self.saved[HEAD][self.patch].clone()

    def write(self, target: Path) -> Path:
        """Write the folder of the language model."""
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
        """Correct the guess; return the largest change (0 if the head was not trained)."""
        if HEAD not in trained:
            return 0.0
        missed = self.saved[HEAD][self.patch] - trained[HEAD][self.patch]
        self.head_row = self.head_row + missed
        return float(missed.abs().max())
