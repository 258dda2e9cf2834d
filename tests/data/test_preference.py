"""Preference files and their dataset: pairs as units, truncation that leaves nothing to compare, errors by row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.data.flat_batch import flatten
from llava.data.preference import PreferenceDataset, read_preferences
from llava.data.quarantine import Quarantine
from llava.errors import DataError
from llava.model.builder import LoadedModel
from tests.support.tiny import tiny_image


def row(number: int, chosen: str = "yes it is", rejected: str = "no", **fields: Any) -> dict[str, Any]:
    return {"id": str(number), "prompt": f"<image>\nQuestion {number}?", "chosen": chosen, "rejected": rejected,
            "images": ["0.png"], **fields}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[Any]], Path]:
    (tmp_path / "images").mkdir()
    tiny_image(0).save(tmp_path / "images" / "0.png")

    def to_file(rows: list[Any]) -> Path:
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps(rows))
        return path

    return to_file


def dataset_of(path: Path, tiny: LoadedModel, max_length: int | None = 512) -> PreferenceDataset:
    return PreferenceDataset(
        read_preferences(path), tiny.processor, image_folder=path.parent / "images", max_length=max_length
    )


def test_a_pair_is_one_unit_whose_sides_share_the_question(write: Callable[..., Path], tiny: LoadedModel) -> None:
    dataset = dataset_of(write([row(0, weight=0.5)]), tiny)
    unit = dataset[0]
    batch = flatten(unit, dataset.images_for(unit), image_token_id=tiny.processor.image_token_id)
    assert len(unit) == 2 and unit[0].images == unit[1].images
    assert batch.num_tokens < batch.num_unshared_tokens and batch.pixel_values is not None
    assert len(batch.pixel_values) == 1 and batch.sequence_values["weight"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_every_form(write: Callable[..., Path], tmp_path: Path, lines: bool, zipped: bool) -> None:
    rows = [row(0), row(1, "maybe")]
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    found = read_preferences(path)
    assert [pair.id for pair in found] == ["0", "1"]
    assert [pair.origin.row for pair in found if pair.origin] == [0, 1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(1, rejected="yes it is"), "are equal"),
        (row(1, chosen=" "), "empty answer"),
        (row(1, images=[]), "1 placeholder"),
        (row(1, images=["0.png", "0.png"]), "2 image"),
        ({"id": "1"}, "not a preference row"),
        ("text", "must be a JSON object"),
    ],
)
def test_bad_rows_are_named_or_listed(write: Callable[..., Path], tmp_path: Path, bad: Any, message: str) -> None:
    path = write([row(0), bad, row(2)])
    with pytest.raises(DataError, match=rf"pairs\.json, row 1: .*{message}"):
        read_preferences(path)
    quarantine = Quarantine(tmp_path / "bad.jsonl")
    assert [pair.id for pair in read_preferences(path, skip_bad=True, quarantine=quarantine)] == ["0", "2"]
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"] == 1


def test_a_file_of_bad_rows_only(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="no row can be used"):
        read_preferences(write([row(0, chosen="")]), skip_bad=True)


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [("b" * 40, "c" * 3, "the chosen answer is cut away entirely"), ("c" * 3, "b" * 40, "the chosen answer is cut")],
)
def test_an_answer_that_the_limit_cuts_away(
    write: Callable[..., Path], tiny: LoadedModel, chosen: str, rejected: str, message: str
) -> None:
    path = write([row(0, chosen, rejected)])
    question = len(dataset_of(path, tiny)[0][0].input_ids) - max(len(chosen), len(rejected))
    with pytest.raises(DataError, match=rf"row 0, id '0': {message}.*raise --model-max-length"):
        _ = dataset_of(path, tiny, max_length=question // 2 + 4)[0]


def test_answers_that_differ_only_beyond_the_limit(write: Callable[..., Path], tiny: LoadedModel) -> None:
    path = write([row(0, "a" * 30 + "b", "a" * 30 + "c")])
    length = len(dataset_of(path, tiny)[0][0].input_ids)
    with pytest.raises(DataError, match="both answers are equal within the maximum length"):
        _ = dataset_of(path, tiny, max_length=length - 8)[0]
