"""Collator: steps as rows, and joined rows."""

from __future__ import annotations

from pathlib import Path

import torch

from llava.data.collator import Collator, joined_rows
from llava.data.dataset import SFTDataset
from llava.data.flat_batch import FlatBatch
from llava.data.loader import StepLoader
from llava.data.records import load_samples
from llava.errors import ConfigError
from llava.model.builder import LoadedModel
from llava.train import data
from llava.train.objectives.sft import SFT
from llava.train.parsing import parse_training_args
from tests.support.runs import arguments, write_uneven

ONE = torch.ones(())


def collator_of(tiny: LoadedModel, folder: Path, **options: object) -> Collator:
    samples = load_samples(write_uneven(folder))
    dataset = SFTDataset(samples, tiny.processor, image_folder=folder / "images", max_length=2048)
    return Collator(dataset, tiny.processor.image_token_id, tiny.processor.pad_token_id, **options)  # type: ignore[arg-type]


def rows_of(collator: Collator, numbers: list[int]) -> list[FlatBatch]:
    return collator([(number, collator.dataset[number]) for number in numbers]).rows


def loss(tiny: LoadedModel, row: FlatBatch) -> torch.Tensor:
    return SFT()(tiny.model, row, num_items=ONE).loss


@torch.no_grad()
def test_joined_rows_have_the_sum_of_their_losses(tiny: LoadedModel, tmp_path: Path) -> None:
    collator = collator_of(tiny, tmp_path)
    (first,), (second,) = rows_of(collator, [0, 2, 4]), rows_of(collator, [5, 1, 1])
    both = joined_rows(first, second)
    torch.testing.assert_close(loss(tiny, both), loss(tiny, first) + loss(tiny, second))
    assert both.num_sequences == 6 and both.num_tokens == first.num_tokens + second.num_tokens


@torch.no_grad()
def test_an_idle_row_adds_nothing_and_brings_an_image(tiny: LoadedModel, tmp_path: Path) -> None:
    collator = collator_of(tiny, tmp_path)
    assert collator.has_both_kinds
    (text_only,) = rows_of(collator, [2, 5])
    assert text_only.pixel_values is None
    with_image = collator.with_image(text_only)
    assert with_image.pixel_values is not None
    torch.testing.assert_close(loss(tiny, with_image), loss(tiny, text_only))
    assert loss(tiny, collator.idle_row()) == 0


def test_rows_hold_at_most_so_many_tokens(tiny: LoadedModel, tmp_path: Path) -> None:
    wide = rows_of(collator_of(tiny, tmp_path), list(range(9)))
    narrow = rows_of(collator_of(tiny, tmp_path, max_tokens_per_row=200), list(range(9)))
    assert len(wide) == 1 < len(narrow)
    assert sum(row.num_sequences for row in narrow) == 9
    with torch.no_grad():
        torch.testing.assert_close(sum(loss(tiny, row) for row in narrow), loss(tiny, wide[0]))


def test_padded_rows_are_not_joined(tiny: LoadedModel, tmp_path: Path) -> None:
    collator = collator_of(tiny, tmp_path, layout="padded")
    (row,) = rows_of(collator, [2])
    try:
        collator.with_image(row)
    except ConfigError as error:
        assert "padded" in str(error)
    else:
        raise AssertionError("padded rows were joined")


def test_loading_processes_work_ahead_and_live_on(tiny: LoadedModel, tmp_path: Path) -> None:
    collator = collator_of(tiny, tmp_path)
    words = {"per_device_train_batch_size": 2, "dataloader_persistent_workers": True}
    ahead = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3}
    loaders = []
    for options in ({}, ahead):  # without processes there are none to keep
        args = parse_training_args(arguments(tmp_path, tmp_path, **words, **options)).training
        order, workers = args.order_spec("off"), args.worker_spec()
        loader, *_ = data.make_loader(collator.dataset, collator, order, workers)  # type: ignore[arg-type]
        assert isinstance(loader, StepLoader)
        loaders.append(loader)
    plain, loader = loaders
    assert loader.prefetch_factor == 3 and loader.persistent_workers and not plain.persistent_workers
    found, processes = [], set()
    for epoch in range(2):
        for each in loaders:
            each.set_epoch(epoch)
        found.append([step.row_ids for step in loader])
        assert found[-1] == [step.row_ids for step in plain]
        processes |= {process.pid for process in loader._iterator._workers}  # type: ignore[union-attr]
    assert found[0] != found[1] and len(processes) == 1
