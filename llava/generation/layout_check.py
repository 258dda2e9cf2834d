"""Selection of the layout that a language model computes exactly, by trial.

A two-layer random copy of the text config runs three sequences that share a beginning as a tree, flat and padded; the
first layout whose logits equal those of each sequence alone is used. Recurrent models, and models that take no
`position_ids` (ALiBi), get `padded`. Where rotary frequencies depend on the longest sequence (`model.rope`), one of the
three is beyond the original context, and is computed alone in every layout, as in training.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llava.constants import IGNORE_INDEX, TREE_ATTENTION
from llava.data.encode import Encoded
from llava.data.flat_batch import Layout, layout_rows, target_logits
from llava.generation.runners import SlotRunner
from llava.model.attention import supports_tree_attention
from llava.model.rope import LONG, forget_lengths, rope_groups, shared_context

logger = logging.getLogger(__name__)

NUM_LAYERS = 2
TOLERANCE = 1e-4
"""Largest accepted error of a logit, relative to the largest logit."""

CANDIDATES: tuple[Layout, ...] = ("tree", "flat", "padded")
NO_IMAGE = -1
"""Image token of the trial, which no token equals."""

VOCABULARY = 512
NUM_SHORT = 2
WINDOW = 24
CONTEXT = 64
"""Sizes of the copy: a small vocabulary costs less; a sliding window, and the context beyond which rotary frequencies
change, must be shorter than the trial to matter."""

FAILURES = (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)
"""Errors of a model that cannot be built or run this way."""


def choose_layout(config: Any, *, decodes: bool = False) -> Layout:
    """Return the cheapest exact layout for the language model of `config` (or for a text config).

    Args:
        config: the configuration.
        decodes: whether the model also decodes in slots (`runners.SlotRunner`), not only whole sequences.
    """
    text = copy.deepcopy(config.get_text_config())
    sequences = _trial_sequences()
    try:
        model = _small_copy(text)
        expected = _logits_by_edge(model, sequences, "padded", alone_above=0)
    except FAILURES as error:
        logger.warning("layout padded: the trial of a small copy of %s failed (%s)", text.model_type, error)
        return "padded"
    shares = supports_tree_attention(model)
    context = shared_context(text)
    reason = "does not compute shared or unpadded rows exactly" if shares else "has its own attention implementation"
    for layout in CANDIDATES if shares else CANDIDATES[-1:]:
        if layout == "padded":
            logger.warning("layout padded: %s %s", text.model_type, reason)
        else:
            model.set_attn_implementation(TREE_ATTENTION)
        try:
            found = _logits_by_edge(model, sequences, layout, alone_above=None if context is None else context.length)
        except FAILURES as error:
            logger.debug("layout %s fails for %s: %s", layout, text.model_type, error)
            continue
        if decodes and layout != "padded" and not _decodes(model, sequences[:NUM_SHORT], layout):
            reason = "attends to other keys than it caches"
            continue
        if (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
            logger.info("layout %s: exact for %s", layout, text.model_type)
            return layout
    logger.warning(
        "%s computes a row differently with other rows in its batch, so results depend on the batch size; use "
        "--per-device-train-batch-size 1, or one slot, for results that do not",
        text.model_type,
    )
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
    if shared_context(text) is not None:
        _shorten_context(text)
    text.dtype = torch.float32
    text._attn_implementation = None  # the library's default for this model is the reference
    text.quantization_config = None
    del text.quantization_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(text).float().eval()
    forget_lengths(model)
    return model


def _shorten_context(text: Any) -> None:
    """Make rotary frequencies change within the trial's length."""
    for group in rope_groups(text):
        if "original_max_position_embeddings" in group:
            group["original_max_position_embeddings"] = CONTEXT
    if hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = CONTEXT
    if not any(group["rope_type"] == LONG for group in rope_groups(text)):
        text.max_position_embeddings = CONTEXT


def _trial_sequences() -> list[Encoded]:
    """Return three branches of one stem, long enough for several attention pieces."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, VOCABULARY, (40,), generator=generator).tolist()
    sequences = []
    for length in (5, 9, 60):  # the one beyond `CONTEXT` is last, as in `layout_rows`
        ids = shared + torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        labels = [IGNORE_INDEX] * len(shared) + ids[len(shared) :]
        sequences.append(Encoded(tuple(ids), tuple(labels), (0,) * len(ids)))
    return sequences


@torch.no_grad()
def _decodes(model: Any, sequences: list[Encoded], layout: Layout) -> bool:
    """Return whether decoding each last token in a slot gives the logits of a plain forward pass."""
    expected = torch.cat(
        [model(input_ids=torch.tensor([s.input_ids]), use_cache=False).logits[:, -1] for s in sequences]
    )
    runner = SlotRunner(model, image_token_id=NO_IMAGE, max_slots=NUM_SHORT, max_length=CONTEXT, layout=layout)
    shorter = [replace(s, input_ids=s.input_ids[:-1], labels=s.labels[:-1], turns=s.turns[:-1]) for s in sequences]
    try:
        runner.join(runner.prefill(shorter, {}), range(len(shorter)))
        found = runner.decode([sequence.input_ids[-1] for sequence in sequences])
    except FAILURES as error:
        logger.debug("decoding in slots fails: %s", error)
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


@torch.no_grad()
def _logits_by_edge(model: Any, sequences: list[Encoded], layout: Layout, *, alone_above: int | None) -> Tensor:
    """Return logits [E, V] in edge order, but sequences longer than `alone_above` last."""
    rows = layout_rows(sequences, {}, image_token_id=NO_IMAGE, layout=layout, alone_above=alone_above)
    return torch.cat([target_logits(model, row)[row.edge_target] for row in rows])
