"""Published loss normalization: equal weights of micro-batches, and no logit of the image placeholder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from llava.constants import IGNORE_INDEX
from llava.data.collator import Collator, StepBatch
from llava.data.dataset import SFTDataset
from llava.data.records import load_samples
from llava.errors import ConfigError
from llava.model.builder import LoadedModel
from llava.train.objectives.sft import SFT
from llava.train.parsing import parse_training_args
from llava.train.run import make_objective, run_sft
from llava.train.trainer import LlavaTrainer
from tests.support.runs import arguments, losses, write_parts, write_uneven

NUM_ROWS, SIZE = 7, 3


def uneven_step(tiny: LoadedModel, folder: Path, **settings: object) -> StepBatch:
    """Seven rows of very different length: two micro-batches of three rows and one of one row."""
    dataset = SFTDataset(
        load_samples(write_uneven(folder)), tiny.processor, image_folder=folder / "images", max_length=2048
    )
    processor = tiny.processor
    plain = Collator(dataset, processor.image_token_id, processor.pad_token_id)
    collator = replace(plain, micro_batch=SIZE, **settings)  # type: ignore[arg-type]
    return collator([(row, dataset[row]) for row in range(NUM_ROWS)])


def mean_of_means(tiny: LoadedModel, step: StepBatch) -> torch.Tensor:
    """Row by row through the library's model, without the logit of the placeholder."""
    means = []
    for start in range(0, NUM_ROWS, SIZE):
        total, count = torch.zeros(()), 0
        for encoded in step.sequences[start : start + SIZE]:
            images = [step.images[key] for key in encoded.images]
            pixels = {"pixel_values": torch.stack(images)} if images else {}
            logits = tiny.model(input_ids=torch.tensor([encoded.input_ids]), **pixels).logits
            assert logits.shape[-1] == tiny.processor.image_token_id + 1
            labels = torch.tensor(encoded.labels[1:])
            total += cross_entropy(logits[0, :-1, :-1], labels, ignore_index=IGNORE_INDEX, reduction="sum")
            count += int((labels != IGNORE_INDEX).sum())
        means.append(total / count)
    return torch.stack(means).mean()


@pytest.mark.parametrize("layout", ["tree", "flat", "padded"])
@pytest.mark.parametrize("limit", [None, 64])
def test_mean_of_the_means_of_micro_batches(tiny: LoadedModel, tmp_path: Path, layout: str, limit: int | None) -> None:
    step = uneven_step(tiny, tmp_path, layout=layout, max_tokens_per_row=limit)
    assert len(step.rows) == 3 if limit is None else len(step.rows) > 3
    assert step.num_supervised == pytest.approx(1.0)
    objective = SFT(without=tiny.processor.image_token_id)
    items = torch.tensor(step.num_supervised)
    loss = sum((objective(tiny.model, row, num_items=items).loss for row in step.rows), torch.zeros(()))
    expected = mean_of_means(tiny, step)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    everything = sum(len(row.edge_weight) for row in step.rows)
    assert step.num_edges == everything == sum(len(s.labels) - s.labels.count(IGNORE_INDEX) for s in step.sequences)


def test_the_placeholder_gets_no_gradient(tiny: LoadedModel, tmp_path: Path) -> None:
    step = uneven_step(tiny, tmp_path)
    token = tiny.processor.image_token_id
    for absent, has_gradient in [(token, False), (None, True)]:
        tiny.model.zero_grad()
        SFT(without=absent)(tiny.model, step.rows[0], num_items=torch.ones(())).loss.backward()
        gradient = tiny.model.lm_head.weight.grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert bool(gradient[token].any()) is has_gradient


def test_a_runs_loss_differs_only_with_the_switch(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    data = write_uneven(tmp_path / "uneven")
    given = {
        "data_path": data,
        "image_folder": data.parent / "images",
        "max_steps": 1,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 3,
        "train_sampling_strategy": "sequential",
    }
    found = {}
    for name in ("tokens", "micro_batches", None):
        run_sft(arguments(parts, tmp_path / str(name), loss_normalization=name, **given))
        found[name] = losses(tmp_path / str(name))
    assert found[None] == found["tokens"]
    assert abs(found["tokens"][0] - found["micro_batches"][0]) > 1e-3


def test_only_our_placeholder_is_excluded(tiny: LoadedModel, tmp_path: Path) -> None:
    args = parse_training_args([*arguments(tmp_path, tmp_path), "--loss_normalization", "micro_batches"]).training
    objective = make_objective(tiny, args)
    assert isinstance(objective, SFT)
    assert objective.without == tiny.processor.image_token_id
    tiny.processor.image_token_id = 7  # a published word, as `<im_patch>` is one in LLaVA-Med 1.0
    objective = make_objective(tiny, args)
    assert isinstance(objective, SFT)
    assert objective.without is None


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected tokens or micro_batches"):
        parse_training_args([*arguments(tmp_path, tmp_path), "--loss_normalization", "rows"])


@pytest.mark.parametrize(
    ("trained", "expected"),
    [([], 1.0), ([2.0, 1.0], 3.0), ([0.25], 1.0), ([0.0, 0.0], 1.0), ([1.0], 1.0), ([0.5, 0.75], 1.25)],
)
def test_a_step_counts_at_least_one_supervised_token(trained: list[float], expected: float) -> None:
    """Without a trained token the loss is 0, not 0 / 0."""
    objective = SimpleNamespace(denominators=("tokens",), count=lambda row: torch.tensor([row], dtype=torch.float64))
    one_rank = SimpleNamespace(objective=objective, accelerator=SimpleNamespace(reduce=lambda count, reduction: count))
    batches = [SimpleNamespace(rows=trained)]
    count = LlavaTrainer._get_num_items_in_batch(one_rank, batches, torch.device("cpu"))  # type: ignore[arg-type]
    assert count.tolist() == [expected]
