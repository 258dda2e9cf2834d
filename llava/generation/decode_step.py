"""Decoding step of a Llama-like model in few operator calls; also prefills short runs of tokens.

    token ids --embedding--> [B, d] --layers: products, attention over the slots--> norm --head--> logits [B, V]

One token for each sequence is so little work that the calls of operators and modules cost as much as the products. The
step computes what the layers of transformers compute, from their own weights, and is used only where every part of the
model is of a kind that it knows; otherwise the model's own forward decodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.generation.extension import ExtensionAttention
from llava.generation.kv_cache import SlotCache
from llava.generation.products import Product, product_of
from llava.model.int8 import Int8Linear

KNOWN_LAYERS: dict[str, Callable[[Any], int | None]] = {
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": lambda attention: None,
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer": lambda attention: (
        attention.config.sliding_window
    ),
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer": lambda attention: attention.sliding_window,
}
"""Classes of layers that the step computes (rotary positions, RMS norms before attention and gated MLP), and how each
finds the window of its attention."""

ATTENTION_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PRODUCTS = ("gate_proj", "up_proj", "down_proj")


class Norm:
    """RMS norm with a weight."""

    def __init__(self, module: Any) -> None:
        self.weight = module.weight
        weight = module.weight
        precise = torch.promote_types(weight.dtype, torch.float32)
        self.epsilon = torch.tensor(float(module.variance_epsilon), dtype=precise, device=weight.device)
        self.is_precise = weight.dtype == precise
        self.share = 1.0 / len(weight)

    def of(self, rows: Tensor) -> Tensor:
        """Return the normalized rows [B, d]."""
        precise = rows if self.is_precise else rows.float()
        length = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
        scaled = precise * torch.addcmul(self.epsilon, length, length, value=self.share).rsqrt_()
        return scaled.mul_(self.weight) if self.is_precise else scaled.to(rows.dtype).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class DecodedLayer:
    """Weights and settings of one layer."""

    norms: tuple[Norm, Norm]
    query: Product
    key: Product
    value: Product
    output: Product
    gate: Product
    up: Product
    down: Product
    activation: Callable[[Tensor], Tensor]
    window: int | None
    scaling: float

    @classmethod
    def of(cls, layer: Any) -> DecodedLayer:
        """Return the parts of a layer of transformers."""
        attention, mlp = layer.self_attn, layer.mlp
        query, key, value, output = (product_of(getattr(attention, name)) for name in ATTENTION_PRODUCTS)
        gate, up, down = (product_of(getattr(mlp, name)) for name in MLP_PRODUCTS)
        return cls(
            norms=(Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)),
            query=query,
            key=key,
            value=value,
            output=output,
            gate=gate,
            up=up,
            down=down,
            activation=mlp.act_fn,
            window=KNOWN_LAYERS[class_name(layer)](attention),
            scaling=attention.scaling,
        )


class DecodeStep:
    """Step of a model; valid while its modules do not change."""

    def __init__(self, model: Any) -> None:
        """Take the weights of a model for which `can_decode` is true."""
        decoder = model.get_decoder()
        attention = decoder.layers[0].self_attn
        self.embedding = decoder.embed_tokens
        self.rotary = decoder.rotary_emb
        self.layers = [DecodedLayer.of(layer) for layer in decoder.layers]
        self.norm = Norm(decoder.norm)
        self.head = product_of(model.get_output_embeddings())
        self.width = int(attention.head_dim)
        self.num_heads = self.layers[0].query.width // self.width
        self.num_key_heads = self.layers[0].key.width // self.width

    def logits(self, token_ids: Sequence[int], cache: SlotCache) -> Tensor:
        """Return the logits [B, V] after one more token for each slot; the cache counts the tokens."""
        # The cache grows outside: buffers that are made in inference mode cannot be written to later.
        logits = self._logits(token_ids, cache.begin_step(), cache)
        cache.end_step()
        return logits

    @torch.inference_mode()
    def _logits(self, token_ids: Sequence[int], positions: Tensor, cache: SlotCache) -> Tensor:
        hidden = self.embedding(torch.tensor(token_ids, device=positions.device))
        cos, sin = self.rotary(hidden[:, None], positions)
        states = _SlotStates(self, hidden, cos, sin, cache)
        return self._after(self._through(hidden, states))

    def read(self, hidden: Tensor, attention: ExtensionAttention, places: Tensor) -> Tensor:
        """Return the logits [K, V] after some of the new tokens of several sequences.

        Args:
            hidden: [T, d] embeddings of the new tokens.
            attention: attends to them and to what their sequences hold.
            places: [K] tokens whose logits are wanted.
        """
        positions = attention.positions().to(hidden.device)[:, None]
        cos, sin = self.rotary(hidden[:, None], positions)
        states = _RunStates(self, hidden, cos, sin, attention)
        found = self._through(hidden, states)
        return self._after(found[places.to(found.device)])

    def _through(self, hidden: Tensor, states: _States) -> Tensor:
        """Return rows [B, d] after all layers."""
        for number, layer in enumerate(self.layers):
            normed = layer.query.rows_of(layer.norms[0].of(hidden))
            attended = states.attend(layer, number, normed)
            hidden = layer.output.added(layer.output.rows_of(attended), hidden)
            normed = layer.gate.rows_of(layer.norms[1].of(hidden))
            gated = layer.activation(layer.gate.of(normed)).mul_(layer.up.of(normed))
            hidden = layer.down.added(gated, hidden)
        return hidden

    def _after(self, hidden: Tensor) -> Tensor:
        """Return the logits [B, V] of rows [B, d] after all layers."""
        return self.head.of(self.head.rows_of(self.norm.of(hidden))).to(hidden.dtype)


class _States(ABC):
    """Queries, keys and values of new tokens, with the views that all layers use, and their rotation."""

    def __init__(self, step: DecodeStep, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Take the rotation `cos`, `sin` [B, 1, D] of the new tokens."""
        num, width = len(hidden), step.width
        queries, keys = step.layers[0].query.width, step.layers[0].key.width
        both = hidden.new_empty(num, queries + keys)
        self.num_heads = step.num_heads
        self.rows = num * step.num_key_heads
        self.query, self.key = both[:, :queries], both[:, queries:]
        self.both = both.view(num, -1, width)
        self.halves = both.view(num, -1, 2, width // 2)
        self.shape = num, -1, width
        self.flat = num, -1
        # Halves are exchanged, and the first one negated: the sign is that of the sine.
        self.cos, self.sin = cos, torch.cat([-sin[..., : width // 2], sin[..., width // 2 :]], dim=-1)

    def rotated(self, layer: DecodedLayer, normed: Tensor) -> Tensor:
        """Return the queries and the keys [B, Hq + Hk, D] of a layer."""
        layer.query.into(normed, self.query)
        layer.key.into(normed, self.key)
        exchanged = self.halves.flip(2).view(self.shape)
        return torch.addcmul(self.both * self.cos, exchanged, self.sin)

    @abstractmethod
    def attend(self, layer: DecodedLayer, number: int, normed: Tensor) -> Tensor:
        """Return the attention [B, Hq * D] of one layer; its keys and values are kept."""


class _SlotStates(_States):
    """States of one new token for each slot."""

    def __init__(self, step: DecodeStep, hidden: Tensor, cos: Tensor, sin: Tensor, cache: SlotCache) -> None:
        """Write to the slots of a cache."""
        super().__init__(step, hidden, cos, sin)
        self.cache = cache
        self.value = hidden.new_empty(len(hidden), self.key.shape[1])
        self.values = self.value.view(-1, step.width)
        self.by_head = self.rows, step.width
        self.by_group = self.rows, -1, step.width

    def attend(self, layer: DecodedLayer, number: int, normed: Tensor) -> Tensor:
        """Return the attention [B, Hq * D] of one layer; its keys and values are written to the slots."""
        layer.value.into(normed, self.value)
        rotated = self.rotated(layer, normed)
        queries = (rotated[:, : self.num_heads] * layer.scaling).view(self.by_group)
        keys = rotated[:, self.num_heads :].reshape(self.by_head)
        return self.cache.attend_heads(number, queries, keys, self.values, layer.window).view(self.flat)


class _RunStates(_States):
    """States of runs of new tokens of several sequences."""

    def __init__(
        self, step: DecodeStep, hidden: Tensor, cos: Tensor, sin: Tensor, attention: ExtensionAttention
    ) -> None:
        """Attend with `attention`, which keeps keys and values."""
        super().__init__(step, hidden, cos, sin)
        self.attention = attention

    def attend(self, layer: DecodedLayer, number: int, normed: Tensor) -> Tensor:
        """Return the attention [T, Hq * D] of one layer."""
        rotated = self.rotated(layer, normed).transpose(0, 1)[None]
        values = layer.value.of(normed).to(rotated.dtype).view(self.shape).transpose(0, 1)[None]
        queries, keys = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        found = self.attention.attend(number, queries, keys, values, scaling=layer.scaling, window=layer.window)
        return found.reshape(self.flat)


def can_decode(model: Any) -> bool:
    """Return whether every part of a model is of a kind that `DecodeStep` computes."""
    if not hasattr(model, "get_decoder"):
        return False
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    layers = list(getattr(decoder, "layers", ()))
    if (
        not layers
        or type(head) not in (nn.Linear, Int8Linear)
        or type(getattr(decoder, "embed_tokens", None)) is not nn.Embedding
    ):
        return False
    if any(class_name(layer) not in KNOWN_LAYERS for layer in layers):
        return False
    products = [product for layer in layers for product in _products(layer)]
    rotates_all = 2 * len(decoder.rotary_emb.inv_freq) == layers[0].self_attn.head_dim
    # Other products are adapters or layers of 4 bits.
    if not rotates_all or any(type(product) not in (nn.Linear, Int8Linear) for product in products):
        return False
    parts = [head, *(module for name, module in decoder.named_modules() if not name.startswith("rotary_emb"))]
    if any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in parts):
        return False
    weights = [weight for module in parts for weight in module.parameters(recurse=False)]
    return len({(type(weight), weight.dtype, weight.device) for weight in weights}) == 1 and not _autocasts(weights[0])


def class_name(layer: Any) -> str:
    """Return the full name of a layer's class."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _products(layer: Any) -> Iterator[nn.Module]:
    for name in ATTENTION_PRODUCTS:
        yield getattr(layer.self_attn, name)
    for name in MLP_PRODUCTS:
        yield getattr(layer.mlp, name)


def _autocasts(weight: Tensor) -> bool:
    return type(weight) is not nn.Parameter or torch.is_autocast_enabled(weight.device.type)
