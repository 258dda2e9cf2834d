"""Rotary frequencies that depend on the longest sequence of a batch: neighbors never change a sequence."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded
from llava.data.flat_batch import Layout, layout_rows, target_logits
from llava.generation import layout_check
from llava.generation.engine import LocalEngine
from llava.generation.layout_check import choose_layout
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.model.builder import LoadedModel
from llava.model.rope import SharedContext, shared_context
from llava.samples import Conversation, Turn
from llava.train.losses import token_logprobs
from llava.train.run import make_collator
from tests.support.generation_tools import ask
from tests.support.tiny import tiny_llava

CONTEXT = 64
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 8.0, 32.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": CONTEXT, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, longrope": ("llama", {"rope_parameters": LONGROPE}),
    "mistral, longrope": ("mistral", {"rope_parameters": LONGROPE}),
    "qwen2, longrope": ("qwen2", {"rope_parameters": LONGROPE}),
    "llama, dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": CONTEXT}),
    "mistral, dynamic": ("mistral", {"rope_parameters": DYNAMIC, "max_position_embeddings": CONTEXT}),
    "qwen2, dynamic": ("qwen2", {"rope_parameters": DYNAMIC, "max_position_embeddings": CONTEXT}),
}


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    name, sizes = KINDS[request.param]
    made = tiny_llava(lm=name, lm_sizes=sizes, seed=4)
    return replace(made, processor=made.processor.changed(template="chatml", system=""))


def sequence(length: int, seed: int, shared: int = 12) -> Encoded:
    """Return a text of random tokens, the first of which equal those of other sequences."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(10, 200, (shared,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = (start + torch.randint(10, 200, (length,), generator=draw).tolist())[:length]
    return Encoded(tuple(ids), (IGNORE_INDEX,) * (length // 2) + tuple(ids[length // 2 :]), (0,) * length)


LENGTHS = (20, 63, 64, 65, 100, 40, 180, 130)
SEQUENCES = [sequence(length, seed) for seed, length in enumerate(LENGTHS)]


@torch.no_grad()
def losses(loaded: LoadedModel, sequences: list[Encoded], layout: Layout) -> list[float]:
    """Return the loss of each sequence, laid out as in training."""
    context = shared_context(loaded.model.config)
    assert context is not None and context.length == CONTEXT
    found = {}
    for row in layout_rows(sequences, {}, image_token_id=-1, layout=layout, alone_above=context.length):
        nll = -token_logprobs(target_logits(loaded.model, row), row.target_ids)[row.edge_target]
        for number, path in enumerate(row.path_positions):
            found[tuple(row.input_ids.flatten()[path].tolist())] = float(nll[row.edge_sequence == number].sum())
    return [found[s.input_ids] for s in sequences]


@pytest.mark.parametrize("layout", ["tree", "flat", "padded"])
def test_every_row_has_the_loss_that_it_has_alone(loaded: LoadedModel, layout: Layout) -> None:
    alone = [losses(loaded, [one], layout)[0] for one in SEQUENCES]
    assert losses(loaded, SEQUENCES, layout) == pytest.approx(alone, rel=1e-4)
    assert losses(loaded, SEQUENCES[::-1], layout) == pytest.approx(alone[::-1], rel=1e-4)


def test_a_long_row_would_change_its_neighbors(loaded: LoadedModel) -> None:
    """What this is about: in one batch, the short rows of a long one have other losses."""
    with torch.no_grad():
        [row] = layout_rows(SEQUENCES, {}, image_token_id=-1, layout="flat")
        mixed = target_logits(loaded.model, row)[row.edge_target[row.edge_sequence == 0]]
        [alone] = layout_rows(SEQUENCES[:1], {}, image_token_id=-1, layout="flat")
        assert not torch.allclose(mixed, target_logits(loaded.model, alone), rtol=1e-3, atol=1e-3)


def test_a_row_does_not_depend_on_earlier_batches(loaded: LoadedModel) -> None:
    first = losses(loaded, [SEQUENCES[4]], "flat")
    losses(loaded, [SEQUENCES[6]], "flat")  # longer, whose frequencies dynamic modules would keep
    assert losses(loaded, [SEQUENCES[4]], "flat") == first
    assert losses(loaded, [SEQUENCES[2]], "flat") == losses(loaded, [SEQUENCES[2]], "tree")


def test_training_lays_them_out_alone(loaded: LoadedModel) -> None:
    args: Any = type("Arguments", (), {"max_tokens_per_row": 8192})
    data: Any = None
    collator = make_collator(data, loaded, "tree", args)
    rows = collator.rows(SEQUENCES, {}, collator.max_tokens_per_row)
    assert [row.num_sequences for row in rows] == [4, 1, 1, 1, 1]
    assert sum(float(row.edge_weight.sum()) for row in rows) == sum(
        len(s.labels) - len(s.labels) // 2 for s in SEQUENCES
    )


def answers(loaded: LoadedModel, sampling: Sampling, *questions: str, **options: Any) -> list[Completion]:
    engine = LocalEngine(loaded.model, loaded.processor, **{"max_tokens": 600, "layout": "tree", **options})
    return [completions[0] for completions in engine.generate([ask(text) for text in questions], sampling)]


QUESTIONS = ("a?", "b " * 60, "Is it?", "c " * 30, "d d d", "e " * 90, "f")


@pytest.mark.parametrize("layout", ["tree", "flat", "padded"])
@pytest.mark.parametrize("slots", [2, 8])
def test_a_long_prompt_does_not_change_other_answers(loaded: LoadedModel, layout: Layout, slots: int) -> None:
    sampling = Sampling(max_new_tokens=12)
    options = {"layout": layout, "max_slots": slots}
    together = answers(loaded, sampling, *QUESTIONS, **options)
    for text, found in zip(QUESTIONS, together, strict=True):
        [alone] = answers(loaded, sampling, text, **options)
        assert found.token_ids == alone.token_ids and found.error is None


def test_an_answer_that_grows_beyond_the_context(loaded: LoadedModel) -> None:
    """With longrope each token is that of a forward pass over all tokens before it; dynamic keeps its cached keys."""
    context = shared_context(loaded.model.config)
    engine = LocalEngine(loaded.model, loaded.processor, max_tokens=600, layout="tree")
    prompt = ask("q" * 8)
    reading = engine.reader.read(prompt).encoded
    num_tokens = CONTEXT - len(reading.input_ids) + 10
    assert 12 <= num_tokens <= 60
    neighbors = [ask("a?"), ask("e " * 90), ask("other")]
    [[found], *_] = engine.generate([prompt, *neighbors], Sampling(max_new_tokens=num_tokens))
    [[alone]] = engine.generate([prompt], Sampling(max_new_tokens=num_tokens))
    assert found.token_ids == alone.token_ids
    if context is None or not context.switches:
        return
    ids = list(reading.input_ids)
    for token in found.token_ids:
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert logits.max() - logits[token] <= 1e-3
        ids.append(token)


def test_scores_do_not_depend_on_other_conversations(loaded: LoadedModel) -> None:
    engine = LocalEngine(loaded.model, loaded.processor, max_tokens=600, layout="tree")
    talks = [Prompt(Conversation((Turn("human", text), Turn("gpt", "yes")))) for text in QUESTIONS]
    together = [score.logprob for score in engine.score(talks)]
    assert together == pytest.approx([engine.score([talk])[0].logprob for talk in talks], rel=1e-4)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PHI3 = Phi3Config(
    **SMALL,
    pad_token_id=0,
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **FACTORS},
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PHI3, SharedContext(4096, switches=True)),
        (LlamaConfig(**SMALL, rope_parameters=LONGROPE), SharedContext(64, switches=True)),
        (
            LlamaConfig(**SMALL, max_position_embeddings=512, rope_parameters=DYNAMIC),
            SharedContext(512, switches=False),
        ),
        (LlamaConfig(**SMALL), None),
        (LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), None),
        (MistralConfig(**SMALL), None),
        (Qwen2Config(**SMALL, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), None),
        (Gemma3TextConfig(**SMALL, head_dim=8), None),
    ],
    ids=str,
)
def test_the_length_is_read_from_the_configuration(config: Any, expected: SharedContext | None) -> None:
    assert shared_context(config) == expected


@pytest.mark.parametrize(
    "config",
    [PHI3, LlamaConfig(**SMALL, rope_parameters=LONGROPE), LlamaConfig(**SMALL, rope_parameters=DYNAMIC)],
    ids=["phi3", "llama longrope", "llama dynamic"],
)
def test_the_trial_of_layouts_covers_long_sequences(
    config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Exact where long sequences are computed alone; otherwise no layout is, and a warning says so."""
    assert choose_layout(config) == "tree"
    monkeypatch.setattr(layout_check, "layout_rows", lambda *args, alone_above, **keywords: layout_rows(
        *args, alone_above=0 if alone_above == 0 else None, **keywords))  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert choose_layout(config) == "padded"
    assert "computes a row differently with other rows in its batch" in caplog.text
