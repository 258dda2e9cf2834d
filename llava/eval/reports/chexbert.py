"""CheXbert: the labels of its network, from weights that the user has.

    FOLDER: chexbert.pth, and config.json and vocab.txt of bert-base-uncased
    text --word pieces--> BERT --first token--> 14 linear heads --largest--> class of each finding

Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava.errors import CheckpointError
from llava.eval.reports.label_scores import BLANK, LabelArray, LabelPair
from llava.report_labels.findings import FINDINGS
from llava.utils.provenance import file_sha256

if TYPE_CHECKING:
    import torch
    from torch import nn

WEIGHTS, CONFIG, VOCABULARY = "chexbert.pth", "config.json", "vocab.txt"

CLASSES = (BLANK, 1, 0, -1)
"""Label of each class of a head: blank, positive, negative, uncertain."""

NUM_CLASSES = [4] * (len(FINDINGS) - 1) + [2]
"""Classes of each head; `No Finding` is blank or positive."""

MAX_TOKENS = 512
BATCH = 16

DERIVED = "bert.embeddings.position_ids"
"""Buffer of old checkpoints that holds the numbers of the positions."""


def label_pair(folder: str | Path, predictions: Sequence[str], references: Sequence[str]) -> LabelPair:
    """Return the CheXbert labels of predictions and references.

    Raises:
        CheckpointError: a file is missing or does not fit the network.
    """
    network = ChexbertLabeler(folder)
    source = f"CheXbert weights {file_sha256(Path(folder) / WEIGHTS)[:12]}"
    return LabelPair(network.labels(predictions), network.labels(references), source)


class ChexbertLabeler:
    """CheXbert network with its tokenizer, on the CPU or the first GPU."""

    def __init__(self, folder: str | Path) -> None:
        import torch
        from transformers import BertTokenizer

        folder = Path(folder)
        for name in (WEIGHTS, CONFIG, VOCABULARY):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder}: no file {name}; expected {WEIGHTS}, and {CONFIG} and {VOCABULARY} of bert-base-uncased"
                )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = load_network(folder).to(self.device)
        self._tokenizer = BertTokenizer(vocab=str(folder / VOCABULARY), do_lower_case=True)

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of a report with its marks; a longer one is cut to 512."""
        words = self._tokenizer.tokenize(" ".join(text.split()))
        start, end = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        ids: list[int] = list(self._tokenizer.convert_tokens_to_ids(words))  # type: ignore[arg-type]  # of a list, a list
        return [start, *ids[: MAX_TOKENS - 2], end]

    def labels(self, texts: Sequence[str]) -> LabelArray:
        """Return the labels of reports, [n, 14]; equal texts are labeled once."""
        import torch

        distinct = sorted(set(texts), key=len)  # neighbors of similar length need little padding
        found: dict[str, np.ndarray[Any, np.dtype[np.int8]]] = {}
        for start in range(0, len(distinct), BATCH):
            batch = distinct[start : start + BATCH]
            ids = [torch.tensor(self.token_ids(text)) for text in batch]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            with torch.inference_mode():
                heads = self.network(padded.to(self.device), mask.to(self.device))
            classes = torch.stack([head.argmax(dim=1) for head in heads], dim=1).cpu().numpy()
            for text, row in zip(batch, classes, strict=True):
                found[text] = np.array([CLASSES[value] for value in row], dtype=np.int8)
        return np.array([found[text] for text in texts], dtype=np.int8).reshape(len(texts), len(FINDINGS))


def load_network(folder: Path) -> nn.Module:
    """Return the network with the weights of a folder, for inference.

    Raises:
        CheckpointError: the file cannot be read, or its tensors do not fit.
    """
    import pickle

    import torch
    from transformers import BertConfig

    try:
        content = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be read as tensors ({type(error).__name__})") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / WEIGHTS}: expected a dictionary with model_state_dict")
    weights = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    weights.pop(DERIVED, None)
    network = new_network(BertConfig.from_pretrained(str(folder / CONFIG)))
    pooler = {name: tensor for name, tensor in network.state_dict().items() if ".pooler." in name}
    # Copies without the unused pooler are in use; its tensors do not reach the heads.
    try:
        network.load_state_dict({**pooler, **weights}, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {' '.join(str(error).split())[:300]}") from error
    return network.eval()


def new_network(config: Any) -> nn.Module:
    """Return the network of a BERT configuration with random weights."""
    from torch import nn
    from transformers import BertModel

    class Network(nn.Module):
        """BERT with one linear head per finding on the state of its first token."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(config)
            self.linear_heads = nn.ModuleList(nn.Linear(config.hidden_size, num) for num in NUM_CLASSES)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
            """Return the logits of each head, [B, 4] or [B, 2]."""
            state = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
            return [head(state) for head in self.linear_heads]

    return Network()
