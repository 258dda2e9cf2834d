"""Rows of preference training: pairs, or single answers with labels, opened and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.data.image_store import ImageIndex
from llava.data.label_rows import Labeled
from llava.data.labeled import LabeledDataset, holds_labels, read_labeled
from llava.data.mixture import is_mixture
from llava.data.preference import PreferenceDataset, read_preferences
from llava.data.quarantine import BadRow, Quarantine, bad_row, bad_rows_message
from llava.errors import ConfigError, DataError
from llava.processing import LlavaMedProcessor
from llava.train.specs import RowsSpec


def open_pairs(spec: RowsSpec, processor: LlavaMedProcessor) -> PreferenceDataset | LabeledDataset:
    """Load pairs, or single answers with labels, into a dataset and check that each can be trained.

    Raises:
        ConfigError: the file does not exist or is of another kind.
        DataError: a row is unusable.
    """
    if not Path(spec.path).is_file() or is_mixture(spec.path):
        what = "a mixture" if Path(spec.path).is_file() else "no such file"
        raise ConfigError(f"{spec.path}: {what}; expected preference pairs: a JSON array or JSON lines")
    if spec.labeled and holds_labels(spec.path):
        return _open_labeled(spec, processor)
    if spec.loader != "default":
        raise ConfigError(f"--loader {spec.loader} reads fine-tuning rows, not preference pairs; use --loader default")
    quarantine = Quarantine(spec.quarantine)
    index = ImageIndex.open(spec.image_folder, dicom=processor.dicom)
    pairs = read_preferences(spec.path, skip_bad=spec.skip_bad, quarantine=quarantine)
    index.verify(list(dict.fromkeys(ref for pair in pairs for ref in pair.images)))
    dataset = PreferenceDataset(
        pairs,
        processor,
        image_folder=spec.image_folder,
        max_length=spec.max_length,
        image_counts_as_one=spec.image_counts_as_one,
        index=index,
        negative=spec.negative,
    )
    return dataset.checked(skip_bad=spec.skip_bad, quarantine=quarantine)


def _open_labeled(spec: RowsSpec, processor: LlavaMedProcessor) -> LabeledDataset:
    """Load single answers with labels and check that each can be trained."""
    quarantine = Quarantine(spec.quarantine)
    rows = read_labeled(spec.path, skip_bad=spec.skip_bad, quarantine=quarantine)
    index = ImageIndex.open(spec.image_folder, dicom=processor.dicom)
    index.verify(list(dict.fromkeys(ref for row in rows for ref in row.sample.images)))

    def dataset_of(kept: Sequence[Labeled]) -> LabeledDataset:
        return LabeledDataset(
            kept,
            processor,
            image_folder=spec.image_folder,
            max_length=spec.max_length,
            image_counts_as_one=spec.image_counts_as_one,
            index=index,
        )

    dataset = dataset_of(rows)
    bad: list[BadRow] = []
    good: list[Labeled] = []
    for number, row in enumerate(rows):
        try:
            _ = dataset[number]
        except DataError as error:
            bad.append(bad_row(row.sample, str(error)))
        else:
            good.append(row)
    if bad and not (spec.skip_bad and good):
        raise DataError(bad_rows_message(bad, len(rows)))
    if spec.skip_bad:
        quarantine.add(bad)
    return dataset_of(good)
