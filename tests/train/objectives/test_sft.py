"""Losses against their definitions, and the objective against the library's own loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IGNORE_INDEX
from llava.data.collator import Collator
from llava.data.dataset import SFTDataset
from llava.data.records import load_samples
from llava.model.builder import LoadedModel
from llava.samples import Conversation, Sample, Turn
from llava.train.losses import edge_sum, edge_sums, token_logprobs
from llava.train.objectives.sft import OBJECTIVES, SFT
from tests.support.runs import write_uneven


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), targets=st.integers(1, 6), edges=st.integers(0, 9))
def test_a_loss_is_a_sum_over_edges(seed: int, targets: int, edges: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(targets, 7, generator=generator)
    ids = torch.randint(0, 7, (targets,), generator=generator)
    edge_target = torch.randint(0, targets, (edges,), generator=generator)
    weights = torch.rand(edges, generator=generator)
    logprobs = logits.log_softmax(-1)
    expected = -sum(
        (weights[edge] * logprobs[target, ids[target]] for edge, target in enumerate(edge_target)), torch.zeros(())
    )
    nll = -token_logprobs(logits, ids)
    torch.testing.assert_close(edge_sum(nll, edge_target, weights), expected)
    groups = torch.arange(edges) % 3
    sums, counts = edge_sums(nll, edge_target, weights, groups, 3)
    torch.testing.assert_close(sums.sum(), expected)
    for group in range(3):
        own = groups == group
        torch.testing.assert_close(sums[group], edge_sum(nll, edge_target[own], weights[own]))
        torch.testing.assert_close(counts[group], weights[own].sum())


def test_no_edge_is_no_loss_but_a_graph() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = edge_sum(-token_logprobs(logits, torch.tensor([1, 2])), none, torch.zeros(0))
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


def test_logprobs_are_float32() -> None:
    logits = torch.tensor([[0.0, 1000.0], [3.0, 3.0]], dtype=torch.bfloat16)
    found = token_logprobs(logits, torch.tensor([1, 0]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([0.0, -0.6931472]))


@pytest.mark.parametrize("layout", ["tree", "flat", "padded"])
def test_sft_is_the_librarys_loss(tiny: LoadedModel, tmp_path: Path, layout: str) -> None:
    """Return the mean over all trained tokens from the model's own loss, one sequence at a time."""
    dataset = SFTDataset(
        load_samples(write_uneven(tmp_path)), tiny.processor, image_folder=tmp_path / "images", max_length=2048
    )
    processor = tiny.processor
    collator = Collator(dataset, processor.image_token_id, processor.pad_token_id, layout)  # type: ignore[arg-type]
    step = collator([(row, dataset[row]) for row in range(6)])
    total, count = torch.zeros(()), 0
    for encoded in step.sequences:
        images = [step.images[key] for key in encoded.images]
        pixels = {"pixel_values": torch.stack(images)} if images else {}
        labels = torch.tensor([encoded.labels])
        num_trained = int((labels != IGNORE_INDEX).sum())
        mean = tiny.model(input_ids=torch.tensor([encoded.input_ids]), labels=labels, **pixels).loss
        total, count = total + mean * num_trained, count + num_trained
    assert step.num_supervised == count
    num_items = torch.tensor(float(count))
    loss = sum((SFT()(tiny.model, row, num_items=num_items).loss for row in step.rows), torch.zeros(()))
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)


def test_objectives_have_names() -> None:
    assert isinstance(OBJECTIVES["sft"](), SFT)


def test_questions_and_answers_have_losses_of_their_own(tiny: LoadedModel, tmp_path: Path) -> None:
    turns = (Turn("human", "Q1"), Turn("gpt", "A1"), Turn("human", "Q2 ?", train=True), Turn("gpt", "A2 and more"))
    processor = tiny.processor.changed(template="v1_sq")
    dataset = SFTDataset([Sample("0", Conversation(turns))], processor, image_folder=tmp_path)
    row = Collator(dataset, processor.image_token_id, processor.pad_token_id)([(0, dataset[0])]).rows[0]
    objective = SFT(asks=True)
    assert objective.metric_names == ("question_loss", "answer_loss")
    output = objective(tiny.model, row, num_items=torch.tensor([1.0]))
    question, answer = (output.metrics[name] for name in objective.metric_names)
    assert question[1] == len(processor.text(" Q2 ?</s>").ids)
    assert answer[1] == sum(len(processor.text(f" {turns[i].text}</s>").ids) for i in (1, 3))
    torch.testing.assert_close(question[0] + answer[0], output.loss.detach())
