"""Optimizer steps of the sides of the training benchmark: ours, transformers, TRL.

As in the published recipe, the tower is frozen and everything else trains. The tower runs in every step, without a
feature cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from benchmarks.common import IMAGE_TOKEN_ID, library_model, our_model, padded_inputs
from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded
from llava.data.flat_batch import flatten
from llava.train.objectives.sft import SFT


class Side(Protocol):
    """Model with its optimizer."""

    def step(self, sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> float:
        """Train on a batch, from sequences to updated weights; return the summed loss of trained tokens."""
        ...


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return the default optimizer of the Trainer with rate 0, which keeps weights and losses equal."""
    return torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.0, fused=True)


def _with_frozen_tower(model: Any) -> Any:
    model.model.vision_tower.requires_grad_(False)
    return model


def num_trained(sequences: Sequence[Encoded]) -> int:
    """Return the number of trained tokens of a batch."""
    return sum(label != IGNORE_INDEX for sequence in sequences for label in sequence.labels)


class Ours:
    """Our side: the flat batch."""

    def __init__(self) -> None:
        self.model = _with_frozen_tower(our_model()).train()
        self.optimizer = _optimizer(self.model)

    def step(self, sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> float:
        """Flatten, forward, backward, update."""
        batch = flatten(sequences, images, image_token_id=IMAGE_TOKEN_ID)
        loss = SFT()(self.model, batch, num_items=batch.edge_weight.sum()).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item() * len(batch.edge_weight)


class Transformers:
    """Side of transformers: `LlavaForConditionalGeneration` on padded rows, with its own loss."""

    def __init__(self) -> None:
        self.model = _with_frozen_tower(library_model(our_model())).train()
        self.optimizer = _optimizer(self.model)

    def step(self, sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> float:
        """Pad, forward, backward, update."""
        loss = self.model(**padded_inputs(sequences, images), use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item()) * num_trained(sequences)


class TRL:
    """Side of TRL: `SFTTrainer.training_step` with its fused, chunked loss, without loop and data."""

    def __init__(self) -> None:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")),
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
        )
        arguments = SFTConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            max_length=None,
        )
        self.trainer = SFTTrainer(
            model=_with_frozen_tower(library_model(our_model())),
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}),
            processing_class=tokenizer,
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.model
        self.optimizer = _optimizer(self.model)

    def step(self, sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> float:
        """Pad, one training step, update."""
        count = num_trained(sequences)
        loss = self.trainer.training_step(self.model, padded_inputs(sequences, images), torch.tensor(count))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item()) * count


SIDES: dict[str, Callable[[], Any]] = {"ours": Ours, "transformers": Transformers, "trl": TRL}
