"""Selection of the layout that a language model computes exactly, by trial.

A two-layer random copy of the text config runs three sequences that share a beginning as a tree, flat and padded; the
first layout whose logits equal the padded ones is used. Recurrent models, and models that take no `position_ids`
(ALiBi), get `padded`.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llava.constants import IGNORE_INDEX, TREE_ATTENTION
from llava.data.encode import Encoded
from llava.data.flat_batch import Layout, flatten, target_logits
from llava.model.attention import supports_tree_attention

logger = logging.getLogger(__name__)

NUM_LAYERS = 2
TOLERANCE = 1e-4
"""Largest accepted error of a logit, relative to the largest logit."""

CANDIDATES: tuple[Layout, ...] = ("tree", "flat")
NO_IMAGE = -1
"""Image token of the trial, which no token equals."""

VOCABULARY = 512
WINDOW = 24
"""Sizes of the copy: a small vocabulary costs less; a sliding window must be shorter than the trial to matter."""

FAILURES = (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)
"""Errors of a model that cannot be built or run this way."""


def choose_layout(config: Any) -> Layout:
    """Return the cheapest exact layout for the language model of `config` (or for a text config)."""
    text = copy.deepcopy(config.get_text_config())
    sequences = _trial_sequences()
    try:
        model = _small_copy(text)
        expected = _logits_by_edge(model, sequences, "padded")
    except FAILURES as error:
        logger.warning("layout padded: the trial of a small copy of %s failed (%s)", text.model_type, error)
        return "padded"
    if not supports_tree_attention(model):
        logger.warning("layout padded: %s has its own attention implementation", text.model_type)
        return "padded"
    model.set_attn_implementation(TREE_ATTENTION)
    for layout in CANDIDATES:
        try:
            found = _logits_by_edge(model, sequences, layout)
        except FAILURES as error:
            logger.debug("layout %s fails for %s: %s", layout, text.model_type, error)
            continue
        if (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
            logger.info("layout %s: exact for %s", layout, text.model_type)
            return layout
    logger.warning("layout padded: %s does not compute shared or unpadded rows exactly", text.model_type)
    return "padded"


def _small_copy(text: Any) -> Any:
    """Return a random float32 copy with two layers (or one of each kind); keep the random state."""
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or []))
    if kinds:  # windows, recurrence and full attention may alternate, so one layer of each kind
        text.layer_types = kinds + kinds[-1:] * (NUM_LAYERS - len(kinds))
    text.num_hidden_layers = max(NUM_LAYERS, len(kinds))
    text.vocab_size = VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    if getattr(text, "sliding_window", None):
        text.sliding_window = WINDOW
    text.dtype = torch.float32
    text._attn_implementation = None  # the library's default for this model is the reference
    text.quantization_config = None
    del text.quantization_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(text).float().eval()


def _trial_sequences() -> list[Encoded]:
    """Return three branches of one stem, long enough for attention in several pieces."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, VOCABULARY, (40,), generator=generator).tolist()
    sequences = []
    for length in (5, 60, 9):
        ids = shared + torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        labels = [IGNORE_INDEX] * len(shared) + ids[len(shared) :]
        sequences.append(Encoded(tuple(ids), tuple(labels), (0,) * len(ids)))
    return sequences


@torch.no_grad()
def _logits_by_edge(model: Any, sequences: list[Encoded], layout: Layout) -> Tensor:
    """Return logits [E, V] in an order that does not depend on the layout."""
    batch = flatten(sequences, {}, image_token_id=NO_IMAGE, layout=layout)
    return target_logits(model, batch)[batch.edge_target]
