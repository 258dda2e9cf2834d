"""Runners: prefill and decoding with a model, on flat rows or, where it needs them, on padded rows.

SlotRunner    one flat tree forward for all waiting prompts; sequences join and leave at any time
PaddedRunner  left-padded rows and the model's own cache; a batch ends before the next one begins
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llava.data.encode import Encoded
from llava.data.flat_batch import Layout, flatten
from llava.data.image_batch import image_places, shown_images
from llava.errors import GenerationError
from llava.generation.decode_step import DecodeStep, can_decode
from llava.generation.extension import Extension, ExtensionAttention
from llava.generation.kv_buffers import bytes_per_token
from llava.generation.kv_cache import CapturedRow, Path, SlotCache, divided_paths
from llava.generation.prefix_cache import KeyValues


class Prefill(Protocol):
    """Prefilled row, some of whose sequences have not started decoding yet."""

    @property
    def logits(self) -> Tensor:
        """Logits [K, V] of the next token of each of the K sequences."""
        ...


class Runner(Protocol):
    """Model with its running sequences, which are numbered 0 to B - 1."""

    @property
    def is_continuous(self) -> bool:
        """Whether sequences may join while others run."""
        ...

    def prefill(self, sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> Prefill:
        """Prefill sequences; `images` are pixels by image key, as the processor returns them."""
        ...

    def join(self, row: Any, members: Sequence[int]) -> None:
        """Start these sequences of a prefilled row; they become the last ones, in this order."""
        ...

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """Append one token to each running sequence and return the logits [B, V] of the next."""
        ...

    def extend(self, numbers: Sequence[int], token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Append several tokens to some running sequences and return the logits [len(numbers), V] of the next."""
        ...

    def leave(self, number: int) -> None:
        """End a running sequence; the last one takes its number."""
        ...

    def rearrange(self, parents: Sequence[int]) -> None:
        """Make running sequence i a continuation of sequence `parents[i]`; all have the same prompt."""
        ...

    def shrink(self, num_slots: int) -> None:
        """Release the memory of sequences beyond `num_slots`, none of which runs."""
        ...

    def reset(self) -> None:
        """Forget all sequences and release their memory."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values of running sequences."""
        ...

    def bytes_for(self, sequences: Sequence[tuple[Encoded, int]]) -> int:
        """Return the bytes of keys and values that sequences need, each with a number of tokens to come."""
        ...


@dataclass(frozen=True, slots=True)
class FlatRow:
    """Prefilled flat row: its logits, keys and values, and the path of each sequence."""

    logits: Tensor
    captured: CapturedRow
    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class KnownRow:
    """Prompt with cached keys and values: its consecutive parts, and name and length of its stem."""

    name: Hashable
    stem_length: int
    parts: Sequence[KeyValues]


class SlotRunner:
    """Runner on flat rows and slots; see `kv_cache`."""

    is_continuous = True

    def __init__(
        self,
        model: Any,
        *,
        image_token_id: int,
        max_slots: int,
        max_length: int,
        max_bytes: float = float("inf"),
        layout: Layout = "tree",
        is_fixed: bool = False,
    ) -> None:
        """Run `model`, whose language model uses tree attention; `is_fixed`: its modules never change."""
        self.model = model
        self.image_token_id = image_token_id
        self.layout = layout
        self.cache = SlotCache(max_slots=max_slots, max_length=max_length, max_bytes=max_bytes)
        self.num_read = 0
        """Tokens that the model computed, in all passes."""
        self.step: DecodeStep | None = None
        self._is_fixed = is_fixed
        self._is_prepared = False

    def prefill(self, sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> FlatRow:
        """Prefill all sequences in one forward pass; common prefixes and images are computed once."""
        batch = flatten(sequences, images, image_token_id=self.image_token_id, layout=self.layout)
        captured = CapturedRow()
        places = batch.paths()
        paths = divided_paths(places, batch.segment_ids)
        batch = batch.to(self.model.device)
        self.num_read += batch.num_tokens
        inputs = {
            **batch.model_inputs(),
            "logits_to_keep": torch.stack([place[-1] for place in places]).to(self.model.device),
            "past_key_values": captured,
            "use_cache": True,
        }
        return FlatRow(self.model(**inputs).logits[0], captured, paths)

    def embed(
        self, encoded: Encoded, start: int, new_images: Sequence[int], pixels: Mapping[str, Tensor]
    ) -> Generator[None, None, Tensor]:
        """Return a prompt's embeddings [1, T - start, d] from token `start`; yield after every tower layer.

        Args:
            encoded: the prompt.
            start: first token, not inside an image.
            new_images: numbers of the images from there on.
            pixels: their pixels by image key.
        """
        self._before_first()
        device = self.model.device
        embeds: Tensor = self.model.get_input_embeddings()(torch.tensor(encoded.input_ids[start:], device=device))
        if not new_images:
            return embeds[None]
        shown = shown_images([(encoded, number) for number in new_images], pixels).keywords()
        inputs = {name: tensor.to(device) for name, tensor in shown.items()}
        if "image_sizes" not in inputs:  # tiles and images of any shape pass as a whole
            inputs["pixel_values"] = yield from self.model.tower_features_in_steps(inputs["pixel_values"])
        found = self.model.get_image_features(**inputs)
        embeds = embeds.clone()
        for number, features in zip(new_images, found.pooler_output, strict=True):
            first, stop = encoded.image_spans[number]
            embeds[first - start : stop - start] = features.to(embeds.device, embeds.dtype)
        return embeds[None]

    def read(
        self, extensions: Sequence[Extension], embeds: Sequence[Tensor], wanted: Sequence[int] | None = None
    ) -> Tensor:
        """Read embedded tokens [1, n, d] of several sequences in one forward pass.

        Args:
            extensions: where their keys and values are kept.
            embeds: the tokens of each.
            wanted: numbers of those sequences whose next token is chosen now; None for all.

        Returns:
            Logits [K, V] after the last token of each wanted sequence.
        """
        attention, states = ExtensionAttention(extensions), torch.cat(list(embeds), dim=1)
        places = attention.last_places()
        places = places if wanted is None else places[list(wanted)]
        self.num_read += states.shape[1]
        if self.step is not None:
            return self.step.read(states[0], attention, places)
        device = self.model.device
        output = self.model(
            inputs_embeds=states,
            position_ids=attention.positions().to(device)[None],
            attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device),
            slots=attention,
            use_cache=False,
            logits_to_keep=places.to(device),
        )
        logits: Tensor = output.logits[0]
        return logits

    def join(self, row: FlatRow | KnownRow, members: Sequence[int]) -> None:
        """Copy the keys and values of these sequences into slots."""
        if isinstance(row, KnownRow):
            self.cache.join_parts(row.name, row.stem_length, row.parts, len(members))
        else:
            self._before_first()
            self.cache.join(row.captured, [row.paths[member] for member in members])

    def _before_first(self) -> None:
        """Choose how the next sequences are prefilled and decoded.

        The model's modules may change while none runs.
        """
        if not self.cache.num_running and not (self._is_fixed and self._is_prepared):
            self.step = DecodeStep(self.model) if can_decode(self.model) else None
            self._is_prepared = True

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """Decode one token for each slot in one forward pass."""
        if self.step is not None:
            self.num_read += len(token_ids)
            return self.step.logits(token_ids, self.cache)
        position_ids = self.cache.begin_step()
        output = self.model(
            input_ids=torch.tensor(token_ids, device=position_ids.device)[:, None],
            position_ids=position_ids,
            # Passed through as it is, so no mask is built; the slots mask their own scores.
            attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool, device=position_ids.device),
            slots=self.cache,
            use_cache=False,
        )
        self.cache.end_step()
        self.num_read += len(token_ids)
        logits: Tensor = output.logits[:, -1]
        return logits

    def extend(self, numbers: Sequence[int], token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Read more tokens of some slots in one forward pass, on top of the keys and values that they hold."""
        extensions = self.cache.begin_extension(numbers, [len(ids) for ids in token_ids])
        ids = torch.tensor([token for tokens in token_ids for token in tokens], device=self.model.device)
        logits = self.read(extensions, [self.model.get_input_embeddings()(ids)[None]])
        self.cache.end_extension(extensions)
        return logits

    def leave(self, number: int) -> None:
        """Free a slot."""
        self.cache.leave(number)

    def rearrange(self, parents: Sequence[int]) -> None:
        """Copy the contents of slots."""
        self.cache.rearrange(parents)

    def shrink(self, num_slots: int) -> None:
        """Drop free slots."""
        self.cache.shrink(num_slots)

    def reset(self) -> None:
        """Start with an empty cache."""
        self.cache = self.cache.emptied()

    @property
    def num_bytes(self) -> int:
        """Bytes of stems and slots."""
        return self.cache.num_bytes

    def bytes_for(self, sequences: Sequence[tuple[Encoded, int]]) -> int:
        """Return the maximum bytes of stems and slots (rectangles) for sequences with tokens to come."""
        prompts = [len(encoded.input_ids) for encoded, _ in sequences]
        totals = [length + num for length, (_, num) in zip(prompts, sequences, strict=True)]
        # A prompt may be divided between stem and slot at any token.
        return len(sequences) * (max(prompts) + max(totals) + 1) * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return self.cache.bytes_per_token or bytes_per_token(self.model)


@dataclass(frozen=True, slots=True)
class PaddedRow:
    """Prefilled left-padded batch: logits [K, V], mask [K, T] and the model's own cache."""

    logits: Tensor
    mask: Tensor
    cache: Any


class PaddedRunner:
    """Runner on left-padded rows, for models without an exact flat layout: exact, but slower.

    A finished sequence keeps its row until the batch ends, because not every cache can drop one.
    """

    is_continuous = False

    def __init__(self, model: Any, *, pad_token_id: int) -> None:
        """Run `model`; `pad_token_id` fills rows and is always masked."""
        self.model = model
        self.pad_token_id = pad_token_id
        language_model = model.get_decoder() if hasattr(model, "get_decoder") else model
        self.takes_positions = "position_ids" in inspect.signature(language_model.forward).parameters
        self.row: PaddedRow | None = None
        self.mask = torch.empty(0)
        self.running: list[int] = []

    def prefill(self, sequences: Sequence[Encoded], images: Mapping[str, Tensor]) -> PaddedRow:
        """Prefill all sequences, each in its own row."""
        longest = max(len(sequence.input_ids) for sequence in sequences)
        ids = torch.full((len(sequences), longest), self.pad_token_id)
        mask = torch.zeros(len(sequences), longest, dtype=torch.long)
        for index, sequence in enumerate(sequences):
            ids[index, longest - len(sequence.input_ids) :] = torch.tensor(sequence.input_ids)
            mask[index, longest - len(sequence.input_ids) :] = 1
        shown = shown_images(image_places(sequences), images).keywords()
        pixels = {name: tensor.to(self.model.device) for name, tensor in shown.items()}
        mask = mask.to(self.model.device)
        output = self._forward(ids.to(self.model.device), mask, None, **pixels)
        return PaddedRow(output.logits[:, -1], mask, output.past_key_values)

    def join(self, row: PaddedRow, members: Sequence[int]) -> None:
        """Start some rows of a batch; no other sequence may be running."""
        if self.running:
            raise GenerationError("sequences cannot join a padded batch that is running")
        self.row, self.mask, self.running = row, row.mask, list(members)

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """Decode one token for each running row; the other rows get padding."""
        assert self.row is not None
        ids = torch.full((len(self.mask), 1), self.pad_token_id, device=self.mask.device)
        rows = torch.tensor(self.running, device=self.mask.device)
        ids[rows, 0] = torch.tensor(token_ids, device=self.mask.device)
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        output = self._forward(ids, mask, self.row.cache)
        self.mask = mask
        logits: Tensor = output.logits[rows, -1]
        return logits

    def extend(self, numbers: Sequence[int], token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Refuse to extend: rows of different lengths cannot share the model's own cache.

        The scheduler prefills them again.
        """
        raise GenerationError("sequences of a padded batch cannot be extended")

    def leave(self, number: int) -> None:
        """Ignore a row from now on."""
        self.running[number] = self.running[-1]
        self.running.pop()
        if not self.running:
            self.row = None

    def rearrange(self, parents: Sequence[int]) -> None:
        """Copy rows of the model's cache.

        Raises:
            GenerationError: the cache cannot be rearranged.
        """
        assert self.row is not None
        if list(parents) == self.running:
            return
        if not hasattr(self.row.cache, "reorder_cache"):
            raise GenerationError(f"the cache of {type(self.model).__name__} cannot be rearranged; use num_beams=1")
        places = [*parents, *range(len(parents), len(self.mask))]
        self.row.cache.reorder_cache(torch.tensor(places, device=self.mask.device))

    def shrink(self, num_slots: int) -> None:
        """Do nothing: no memory is kept beyond the running batch."""

    def reset(self) -> None:
        """Drop the running batch."""
        self.row, self.running = None, []

    @property
    def num_bytes(self) -> int:
        """Return 0: the size of a model's own cache is unknown."""
        return 0

    def bytes_for(self, sequences: Sequence[tuple[Encoded, int]]) -> int:
        """Return the bytes of padded rows."""
        longest = max(len(encoded.input_ids) + num for encoded, num in sequences)
        return len(sequences) * longest * bytes_per_token(self.model)

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any, **inputs: Any) -> Any:
        if self.takes_positions:
            positions = mask.cumsum(dim=1) - 1
            inputs["position_ids"] = positions.clamp(min=0)[:, -ids.shape[1] :]
        inputs["logits_to_keep"] = 1
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs)
        if getattr(output, "past_key_values", None) is None:
            raise GenerationError(
                f"{type(self.model).__name__} returns no cache; generation needs a causal language model with a cache"
            )
        return output
