"""KTO over rows of a step: an estimate over all of them, good and bad answers, and gradients of these only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.data.collator import Collator
from llava.data.encode import Unit
from llava.data.labeled import with_mismatched
from llava.data.loader import StepLoader
from llava.data.preference import PreferenceDataset, read_preferences
from llava.data.samplers import RandomSampler
from llava.model.builder import LoadedModel
from llava.train.objectives.kto import KtoLoss
from llava.train.preference_losses import kto
from llava.train.reference import sequence_logprobs
from tests.support.pairs import write_pairs


def collator_of(tiny: LoadedModel, folder: Path) -> Collator:
    dataset = PreferenceDataset(
        read_preferences(write_pairs(folder, 4)), tiny.processor, image_folder=folder / "images", max_length=512
    )
    processor = tiny.processor
    return Collator(dataset, processor.image_token_id, processor.pad_token_id, complete=with_mismatched)


def test_the_loss_of_a_step_does_not_depend_on_its_rows(tiny: LoadedModel, tmp_path: Path) -> None:
    collator = collator_of(tiny, tmp_path)
    step = collator([(row, collator.dataset[row]) for row in range(4)])
    objective = KtoLoss(lambda batch: sequence_logprobs(tiny.model, batch) - 1.5 + 0.1 * batch.edge_sequence.max(),
                        beta=0.3, weights=(1.0, 2.0))  # fmt: skip
    [whole] = collator.rows(step.units, step.images, None)
    parts = collator.rows(step.units, step.images, 1)
    assert len(parts) == 4 and objective.count(whole).item() == 8 == sum(objective.count(row).item() for row in parts)

    objective = KtoLoss(lambda batch: sequence_logprobs(tiny.model, batch) * 0.9, beta=0.3, weights=(1.0, 2.0))
    sums = objective.step_share(tiny.model, whole)
    split = sum(objective.step_share(tiny.model, row) for row in parts)
    assert sums[1] == 8 and torch.allclose(sums, torch.as_tensor(split), atol=1e-3)
    objective.estimate = torch.tensor(0.25)
    items = torch.tensor([8.0])
    first = objective(tiny.model, whole, num_items=items).loss
    total = sum(objective(tiny.model, row, num_items=items).loss for row in parts)
    assert float(first) == pytest.approx(float(total), abs=1e-5)


def test_values_and_gradients_are_those_of_the_labeled_answers(tiny: LoadedModel, tmp_path: Path) -> None:
    collator = collator_of(tiny, tmp_path)
    [row] = collator([(number, collator.dataset[number]) for number in range(4)]).rows
    reference = sequence_logprobs(tiny.model, row).detach() * 0.9
    objective = KtoLoss(lambda batch: reference, beta=0.3)
    output = objective(tiny.model, row, num_items=torch.tensor([8.0]))
    logps = sequence_logprobs(tiny.model, row)
    kind = row.sequence_values["kind"]
    estimate = (logps - reference)[kind == -1].mean().clamp(min=0)
    losses = kto(logps[kind >= 0], reference[kind >= 0], kind[kind >= 0] == 1, estimate, beta=0.3)
    assert float(output.loss) == pytest.approx(float(losses.mean()), abs=1e-6)
    weight = next(parameter for parameter in tiny.model.parameters() if parameter.requires_grad)
    found = torch.autograd.grad(output.loss, weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(losses.mean(), weight)[0], rtol=1e-4, atol=1e-7)
    assert output.metrics["rewards/chosen"][1] == 4 and output.metrics["mismatched_logratio"][1] == 8
    assert set(output.metrics) == set(objective.metric_names)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_of_two_ranks_make_the_units_of_one(tiny: LoadedModel, tmp_path: Path, workers: int) -> None:
    collator = collator_of(tiny, tmp_path)

    def units(rank: int, world_size: int) -> list[list[Unit]]:
        sampler = RandomSampler(4, 2 // world_size, rank=rank, world_size=world_size, seed=3)
        return [step.units for step in StepLoader(sampler, collator, num_workers=workers)]

    whole, first, second = units(0, 1), units(0, 2), units(1, 2)
    assert [one + two for one, two in zip(first, second, strict=True)] == whole
    assert [len(unit) for step in first for unit in step] == [4, 4]
