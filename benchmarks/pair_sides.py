"""Optimizer steps of the sides of the preference benchmark: ours, padded rows, TRL; a LoRA adapter trains."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from trl import DPOConfig, DPOTrainer

from benchmarks.common import (
    BOS_TOKEN_ID,
    IMAGE_SIZE,
    IMAGE_TOKEN_ID,
    NUM_IMAGE_TOKENS,
    library_model,
    our_model,
    padded_inputs,
)
from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded, Unit
from llava.data.flat_batch import FlatBatch, flatten
from llava.train.objectives.pairs import REFERENCE, PairLoss, PairLossSpec
from llava.train.reference import sequence_logprobs

BETA = 0.1
QUESTION_TOKENS = 20
TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
"""Full path of the adapted layers; a suffix would also match those of the tower."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Pairs of a step: pictures, pairs about each, tokens of an answer."""

    num_images: int
    pairs_per_image: int
    answer_tokens: int


WORKLOADS = {
    "1p30": Workload(8, 1, 30),
    "1p300": Workload(4, 1, 300),
    "5p30": Workload(2, 5, 30),
}
"""Workloads by name: one or five pairs a picture, answers of 30 or 300 tokens."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Units of a step, each a chosen and a rejected sequence, and their images."""

    units: list[Unit]
    images: dict[str, Tensor]

    @property
    def sequences(self) -> list[Encoded]:
        """All sequences, the chosen ones first, as TRL stacks them."""
        return [unit[side] for side in (0, 1) for unit in self.units]


def random_pairs(work: Workload, *, seed: int = 0) -> PairBatch:
    """Return random pairs: both sides of a pair share image and question, pairs about an image share the image."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    images = {f"image {n}": torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for n in range(work.num_images)}
    units: list[Unit] = []
    for key in images:
        for _ in range(work.pairs_per_image):
            question = [draw.randrange(3, IMAGE_TOKEN_ID) for _ in range(QUESTION_TOKENS)]
            answers = [[draw.randrange(3, IMAGE_TOKEN_ID) for _ in range(work.answer_tokens)] for _ in range(2)]
            units.append(tuple(_sequence(key, question, answer) for answer in answers))
    return PairBatch(units, images)


def _sequence(key: str, question: Sequence[int], answer: Sequence[int]) -> Encoded:
    ids = (BOS_TOKEN_ID, *([IMAGE_TOKEN_ID] * NUM_IMAGE_TOKENS), *question, *answer)
    labels = (*([IGNORE_INDEX] * (len(ids) - len(answer))), *answer)
    return Encoded(ids, labels, (0,) * len(ids), ((1, 1 + NUM_IMAGE_TOKENS),), (key,))


def adapter_config() -> LoraConfig:
    """Return the adapter of all sides."""
    return LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)


def with_adapter(model: Any) -> Any:
    """Return a model with an adapter that has some weights already."""
    model.requires_grad_(False)
    return filled(get_peft_model(model, adapter_config()))


def filled(adapted: Any, *, seed: int = 1) -> Any:
    """Return a model whose adapter has random weights, which are the same in every class of model."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(adapted.named_parameters()):
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return adapted.train()


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return an optimizer with rate 0, which keeps weights and losses equal."""
    return torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.0, fused=True)


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """Return a model in a precision; in float64 its norms are too, which those of transformers are not."""
    if dtype == torch.float64:
        norms = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
        for parent, name, child in norms:
            if isinstance(child, LlamaRMSNorm):
                exact = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                exact.weight = child.weight
                setattr(parent, name, exact)
    return model.to(dtype)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the adapter by name of its layer."""
    found = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            found[re.sub(r"^.*language_model\.", "", name)] = weight.grad.detach().double()
    return found


class Side:
    """Model with its optimizer; subclasses compute the loss of a step."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = _optimizer(model)

    def backward(self, batch: PairBatch) -> float:
        """Return the loss of a batch, from its sequences, after the backward pass."""
        loss = self.loss(batch)
        loss.backward()
        return float(loss.item())

    def loss(self, batch: PairBatch) -> Tensor:
        """Return the loss with its graph."""
        raise NotImplementedError

    def step(self, batch: PairBatch) -> float:
        """Train on a batch and return its loss."""
        loss = self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class Ours(Side):
    """Our side: pairs as trees; the reference in the step without the adapter, or from the rows.

    Args:
        cached: whether the rows carry the reference, see `with_reference`.
        shape: see `benchmarks.common.SHAPES`.
        dtype: precision of the model.
    """

    def __init__(self, *, cached: bool = False, shape: str = "24m", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(in_precision(with_adapter(our_model(shape=shape)), dtype))
        self.dtype = dtype
        spec = PairLossSpec(beta=BETA)
        self.objective = PairLoss(spec) if cached else PairLoss(spec, reference=self.reference)

    @torch.no_grad()
    def reference(self, batch: FlatBatch) -> Tensor:
        """Return the log-probabilities of a row without the adapter."""
        with self.model.disable_adapter():
            return sequence_logprobs(self.model, batch)

    def lay_out(self, batch: PairBatch) -> FlatBatch:
        """Return a batch as a row."""
        images = {key: pixels.to(self.dtype) for key, pixels in batch.images.items()}
        sequences = [sequence for unit in batch.units for sequence in unit]
        return flatten(sequences, images, image_token_id=IMAGE_TOKEN_ID, unit_sizes=[2] * len(batch.units))

    def with_reference(self, batch: PairBatch) -> PairBatch:
        """Return the batch whose sequences carry their log-probabilities under the reference: one forward pass."""
        values = iter(self.reference(self.lay_out(batch)).tolist())
        units = [
            tuple(replace(sequence, numbers={REFERENCE: next(values)}) for sequence in unit) for unit in batch.units
        ]
        return PairBatch(units, batch.images)

    def loss(self, batch: PairBatch) -> Tensor:
        """Return the loss of a batch."""
        row = self.lay_out(batch)
        loss: Tensor = self.objective(self.model, row, num_items=self.objective.count(row)).loss
        return loss


class Padded(Side):
    """Two padded rows a pair in transformers' model, its head on supervised positions only.

    Args:
        cached: whether the rows carry the reference.
        shape: see `benchmarks.common.SHAPES`.
        dtype: precision of the model.
    """

    def __init__(self, *, cached: bool = False, shape: str = "24m", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(in_precision(with_adapter(library_model(our_model(shape=shape), shape)), dtype))
        self.cached = cached
        self.dtype = dtype

    def logps(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the summed log-probability of the trained tokens of each row, [2B] float64."""
        labels = inputs["labels"][:, 1:]
        kept = labels != IGNORE_INDEX
        network = self.model.get_base_model()
        values = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = network.model(**values, use_cache=False).last_hidden_state[:, :-1][kept]
        wide = network.lm_head(hidden)
        picked = wide.log_softmax(-1).gather(1, labels[kept][:, None])[:, 0].double()
        rows = kept.nonzero()[:, 0]
        return picked.new_zeros(len(labels)).index_add(0, rows, picked)

    def inputs(self, batch: PairBatch) -> dict[str, Tensor]:
        """Return a batch as padded rows."""
        inputs = padded_inputs(batch.sequences, batch.images)
        return {**inputs, "pixel_values": inputs["pixel_values"].to(self.dtype)}

    def loss(self, batch: PairBatch) -> Tensor:
        """Return the loss of a batch."""
        inputs = self.inputs(batch)
        if self.cached:
            reference = torch.tensor([s.numbers[REFERENCE] for s in batch.sequences], dtype=torch.float64)
        else:
            with torch.no_grad(), self.model.disable_adapter():
                reference = self.logps(inputs)
        chosen, rejected = (self.logps(inputs) - reference).chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)).mean()


class TRL(Side):
    """Side of TRL: `DPOTrainer.training_step` on prepared tensors, without loop and data.

    Args:
        shape: see `benchmarks.common.SHAPES`.
        options: other values of `DPOConfig`, such as `loss_type`.
    """

    def __init__(self, *, shape: str = "24m", **options: Any) -> None:
        words = WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        arguments = DPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            max_length=None,
            beta=BETA,
            **options,
        )
        rows = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
        self.trainer = DPOTrainer(
            model=library_model(our_model(shape=shape), shape),
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            peft_config=adapter_config(),  # of an adapter that exists, TRL takes a copy as reference
        )
        filled(self.trainer.model)
        self.trainer.current_gradient_accumulation_steps = 1
        super().__init__(self.trainer.model)

    def backward(self, batch: PairBatch) -> float:
        """Return the loss of a batch after TRL's own backward pass."""
        inputs = padded_inputs(batch.sequences, batch.images)
        inputs["completion_mask"] = (inputs.pop("labels") != IGNORE_INDEX).long()
        return float(self.trainer.training_step(self.model, inputs, None).item())
