"""How a model computes: prefill, join, decode, leave. One runner for models that take flat rows, one for all others.

SlotRunner    one flat tree forward for all waiting prompts; sequences join and leave at any time
PaddedRunner  left-padded rows and the model's own cache; a batch ends before the next one begins
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llava.data.encode import Encoded
from llava.data.flat_batch import Layout, flatten, places_of, shown_images
from llava.errors import GenerationError
from llava.generation.kv_cache import CapturedRow, Path, SlotCache, divided_paths
from llava.model.quantization import quantized_layers


class Prefill(Protocol):
    """A prefilled row that sequences can still join from."""

    @property
    def logits(self) -> Tensor:
        """[K, V]: what follows each of the K sequences."""
        ...


class Runner(Protocol):
    """A model and its running sequences, which are numbered 0 to B - 1."""

    @property
    def is_continuous(self) -> bool:
        """Whether sequences may join while others run."""
        ...

    def prefill(self, sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> Prefill:
        """Read sequences; `images` are pictures by key, as the processor makes them."""
        ...

    def join(self, row: Any, members: Sequence[int]) -> None:
        """Let these sequences of a prefilled row run; they become the last ones, in this order."""
        ...

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """Append one token to each running sequence and return [B, V]: what follows."""
        ...

    def leave(self, number: int) -> None:
        """End a running sequence; the last one takes its number."""
        ...

    def rearrange(self, parents: Sequence[int]) -> None:
        """Let running sequence i go on from what sequence `parents[i]` holds; all continue one prompt."""
        ...

    def shrink(self, num_slots: int) -> None:
        """Give back the memory of sequences beyond `num_slots`, none of which runs."""
        ...


class AnsweringMode:
    """The mode in which a model answers: no gradients and no dropout.

    A 4-bit layer on the CPU that runs once in evaluation mode without gradients changes its weights to a form that
    never gives gradients again, so such layers run in training mode, which is the same computation.
    """

    def __init__(self, model: nn.Module) -> None:
        """List the modules once; a model that gets other modules (an adapter) needs a new object."""
        quantized = {id(layer) for layer in quantized_layers(model)}
        self._modes = [(module, id(module) in quantized) for module in model.modules()]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the mode; afterwards every module is in the mode in which it was found."""
        switched = [module for module, training in self._modes if module.training != training]
        for module in switched:
            module.training = not module.training
        try:
            with torch.no_grad():
                yield
        finally:
            for module in switched:
                module.training = not module.training


@dataclass(frozen=True, slots=True)
class FlatRow:
    """A prefilled flat row: its keys and values, and where each sequence lies in it."""

    logits: Tensor
    captured: CapturedRow
    paths: tuple[Path, ...]


class SlotRunner:
    """Flat rows and slots; see `kv_slots`."""

    is_continuous = True

    def __init__(
        self,
        model: Any,
        *,
        image_token_id: int,
        max_slots: int,
        max_length: int,
        layout: Layout = "tree",
    ) -> None:
        """Run `model`, whose language model attends tree by tree (`model.attention`)."""
        self.model = model
        self.image_token_id = image_token_id
        self.layout = layout
        self.cache = SlotCache(max_slots=max_slots, max_length=max_length)

    def prefill(self, sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> FlatRow:
        """Read all sequences in one forward pass; common beginnings and images are computed once."""
        batch = flatten(sequences, images, image_token_id=self.image_token_id, layout=self.layout)
        captured = CapturedRow()
        places = batch.paths()
        paths = divided_paths(places, batch.segment_ids)
        batch = batch.to(self.model.device)
        inputs = {
            **batch.model_inputs(),
            "logits_to_keep": torch.stack([place[-1] for place in places]).to(self.model.device),
            "past_key_values": captured,
            "use_cache": True,
        }
        return FlatRow(self.model(**inputs).logits[0], captured, paths)

    def join(self, row: FlatRow, members: Sequence[int]) -> None:
        """Copy the keys and values of these sequences into slots."""
        self.cache.join(row.captured, [row.paths[member] for member in members])

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """One token for each slot in one forward pass."""
        position_ids = self.cache.begin_step()
        output = self.model(
            input_ids=torch.tensor(token_ids, device=position_ids.device)[:, None],
            position_ids=position_ids,
            # Taken as it is, so that no mask is built; the slots know who sees what.
            attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool, device=position_ids.device),
            slots=self.cache,
            use_cache=False,
        )
        self.cache.end_step()
        logits: Tensor = output.logits[:, -1]
        return logits

    def leave(self, number: int) -> None:
        """Free a slot."""
        self.cache.leave(number)

    def rearrange(self, parents: Sequence[int]) -> None:
        """Copy what the slots hold."""
        self.cache.rearrange(parents)

    def shrink(self, num_slots: int) -> None:
        """Drop free slots."""
        self.cache.shrink(num_slots)


@dataclass(frozen=True, slots=True)
class PaddedRow:
    """A prefilled left-padded batch: logits [K, V], mask [K, T] and the model's own cache."""

    logits: Tensor
    mask: Tensor
    cache: Any


class PaddedRunner:
    """The library's way, for models that cannot be given positions: exact, and slower.

    A finished sequence keeps its row until the batch ends, because not every cache can drop one.
    """

    is_continuous = False

    def __init__(self, model: Any, *, pad_token_id: int) -> None:
        """Run `model`; `pad_token_id` fills rows up, and is always masked."""
        self.model = model
        self.pad_token_id = pad_token_id
        language_model = model.get_decoder() if hasattr(model, "get_decoder") else model
        self.takes_positions = "position_ids" in inspect.signature(language_model.forward).parameters
        self.row: PaddedRow | None = None
        self.mask = torch.empty(0)
        self.running: list[int] = []

    def prefill(self, sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> PaddedRow:
        """Read all sequences, each in a row of its own."""
        longest = max(len(sequence.input_ids) for sequence in sequences)
        ids = torch.full((len(sequences), longest), self.pad_token_id)
        mask = torch.zeros(len(sequences), longest, dtype=torch.long)
        for index, sequence in enumerate(sequences):
            ids[index, longest - len(sequence.input_ids) :] = torch.tensor(sequence.input_ids)
            mask[index, longest - len(sequence.input_ids) :] = 1
        shown = shown_images(places_of(sequences), images).keywords()
        pixels = {name: tensor.to(self.model.device) for name, tensor in shown.items()}
        mask = mask.to(self.model.device)
        output = self._forward(ids.to(self.model.device), mask, None, **pixels)
        return PaddedRow(output.logits[:, -1], mask, output.past_key_values)

    def join(self, row: PaddedRow, members: Sequence[int]) -> None:
        """Let some rows of a batch run; nothing else may be running."""
        if self.running:
            raise GenerationError("a padded batch is still running; sequences cannot join it")
        self.row, self.mask, self.running = row, row.mask, list(members)

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """One token for each running row; the others are fed padding."""
        assert self.row is not None
        ids = torch.full((len(self.mask), 1), self.pad_token_id, device=self.mask.device)
        rows = torch.tensor(self.running, device=self.mask.device)
        ids[rows, 0] = torch.tensor(token_ids, device=self.mask.device)
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        output = self._forward(ids, mask, self.row.cache)
        self.mask = mask
        logits: Tensor = output.logits[rows, -1]
        return logits

    def leave(self, number: int) -> None:
        """Stop listening to a row."""
        self.running[number] = self.running[-1]
        self.running.pop()
        if not self.running:
            self.row = None

    def rearrange(self, parents: Sequence[int]) -> None:
        """Copy rows of the model's cache.

        Raises:
            GenerationError: it cannot be rearranged.
        """
        assert self.row is not None
        if list(parents) == self.running:
            return
        if not hasattr(self.row.cache, "reorder_cache"):
            raise GenerationError(f"the cache of {type(self.model).__name__} cannot be rearranged; use num_beams=1")
        places = [*parents, *range(len(parents), len(self.mask))]
        self.row.cache.reorder_cache(torch.tensor(places, device=self.mask.device))

    def shrink(self, num_slots: int) -> None:
        """Nothing is kept beyond the running batch."""

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any, **inputs: Any) -> Any:
        if self.takes_positions:
            positions = mask.cumsum(dim=1) - 1
            inputs["position_ids"] = positions.clamp(min=0)[:, -ids.shape[1] :]
        inputs["logits_to_keep"] = 1
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs)
        if getattr(output, "past_key_values", None) is None:
            raise GenerationError(
                f"{type(self.model).__name__} returns no cache; generation needs a model that can continue a text"
            )
        return output
