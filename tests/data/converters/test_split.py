"""`llava data split`: groups stay together, results are reproducible, rows without a key are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.converters.split import SplitOptions, main, parse_fractions, split_at, split_of, split_rows, unit_hash
from llava.errors import ConfigError, DataError
from tests.support.releases import rows_in, write_image, write_rows

FRACTIONS = {"train": 0.5, "val": 0.2, "test": 0.3}


def rows(num_patients: int = 40, num_each: int = 3) -> list[dict[str, Any]]:
    return [
        {"id": f"{p}-{n}", "image": f"{p}_{n}.png", "patient": p, "kind": "ab"[p % 2], "conversations": []}
        for p in range(num_patients)
        for n in range(num_each)
    ]


def test_places_are_pinned() -> None:
    """The hash is part of the format: later versions reproduce the split."""
    assert [split_of(f"patient {n}", FRACTIONS, seed=0) for n in range(8)] == [
        "train",
        "train",
        "train",
        "val",
        "train",
        "train",
        "test",
        "train",
    ]
    assert unit_hash("patient 1", seed=0) == 0.11671211950392335


def test_no_patient_is_in_two_splits() -> None:
    data = rows()
    places = split_rows(data, SplitOptions(("patient",), FRACTIONS))
    groups = {row["patient"]: place for row, place in zip(data, places, strict=True)}
    assert all(groups[row["patient"]] == place for row, place in zip(data, places, strict=True))
    assert set(places) == set(FRACTIONS)
    more = [*rows(60)[:-1]]
    assert (
        split_rows(more, SplitOptions(("patient",), FRACTIONS))[: len(data)] == places
    )  # later rows move no earlier one
    assert split_rows(data, SplitOptions(("patient",), FRACTIONS, seed=1)) != places


def test_rows_that_share_an_image_stay_together() -> None:
    data = rows(20, 2)
    for row in data[:30:10]:
        row["image"] = [row["image"], "shared.png"]
    places = split_rows(data, SplitOptions(("patient", "image"), FRACTIONS))
    assert len({places[number] for number in (0, 1, 10, 11, 20, 21)}) == 1
    assert set(places) == set(FRACTIONS)


@pytest.mark.parametrize(
    "forms",
    [
        ("a/{}.png", "./a//{}.png"),
        ("{}.png", "b/../{}.png"),
        ("/d/{}.png", "file:///d/{}.png"),
        ("a\\{}.png", "a/./{}.png"),
        ("http://H/{}.png", "http://h//{}.png"),
        ("a/b/{}.png", "a/c/../b/{}.png"),
        ("a/{}.png", "././a/./{}.png"),
        ("a b/{}.png", "./a b///{}.png"),
    ],
)
def test_spellings_of_one_image_name_stay_together(forms: tuple[str, str]) -> None:
    data = [{"id": "", "image": form.format(n)} for n in range(20) for form in forms]
    places = split_rows(data, SplitOptions(("image",), FRACTIONS))
    assert places[::2] == places[1::2] and set(places) == set(FRACTIONS)
    lists = [{"id": "", "images": [row["image"], f"other{n}.png"]} for n, row in enumerate(data)]
    again = split_rows(lists, SplitOptions(("image",), FRACTIONS))
    assert again[::2] == again[1::2]


def test_equal_bytes_are_one_image(tmp_path: Path) -> None:
    data = [{"id": str(n), "image": f"{n}.png"} for n in range(24)]
    for n in range(24):
        write_image(tmp_path / f"{n}.png", n // 2)
    places = split_rows(data, SplitOptions(("image",), FRACTIONS, image_folder=str(tmp_path)))
    assert places[::2] == places[1::2]
    assert (
        split_rows(data, SplitOptions(("image",), FRACTIONS))[::2]
        != split_rows(data, SplitOptions(("image",), FRACTIONS))[1::2]
    )


def test_stratified_shares_are_close() -> None:
    data = rows(40, 1)
    places = split_rows(data, SplitOptions(("patient",), {"train": 0.5, "test": 0.5}, stratify="kind"))
    for kind in "ab":
        chosen = [place for row, place in zip(data, places, strict=True) if row["kind"] == kind]
        assert chosen.count("train") == chosen.count("test") == 10


def test_a_patient_is_one_however_the_number_is_written() -> None:
    written = [{**row, "patient": (float, str, int)[n % 3](row["patient"])} for n, row in enumerate(rows())]
    options = SplitOptions(("patient",), FRACTIONS)
    assert split_rows(written, options) == split_rows(rows(), options)


@pytest.mark.parametrize("value", [None, "", "  ", 1.5, float("nan"), True, "unknown", "N/A"])
def test_a_row_without_the_key_is_refused(value: Any) -> None:
    data = rows(5)
    data[7]["patient"] = value
    with pytest.raises(DataError, match=r"all\.json: 1 of 15 rows have no 'patient', for example row 7"):
        split_rows(data, SplitOptions(("patient",), FRACTIONS), name="all.json")
    del data[4]["image"]
    with pytest.raises(DataError, match="1 of 15 rows have no 'image', for example row 4"):
        split_rows(data, SplitOptions(("image",), FRACTIONS), name="all.json")


def test_inputs_are_not_replaced_and_old_splits_are_removed(tmp_path: Path) -> None:
    source, out = tmp_path / "train.json", tmp_path / "split"
    source.write_text(json.dumps(rows()))
    with pytest.raises(ConfigError, match="would replace"):
        main([str(source), "--by", "patient", "--out", str(tmp_path), "--overwrite"])
    assert json.loads(source.read_text()) == rows()
    main([str(source), "--by", "patient", "--fractions", "train=0.5,test=0.5", "--out", str(out)])
    (out / "own.json").write_text("[]")
    main([str(source), "--by", "patient", "--fractions", "train=0.5,val=0.5", "--out", str(out), "--overwrite"])
    found = {path.name for path in out.iterdir()}
    assert found == {"train.json", "val.json", "own.json", "manifest.json"}, "rows of test.json are in train.json now"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "all.json", rows())
    words = [str(file), "--by", "patient", "--fractions", "train=0.5,val=0.2,test=0.3", "--out", str(tmp_path / "out")]
    main(words)
    found = {split: rows_in(tmp_path / "out" / f"{split}.json") for split in FRACTIONS}
    assert sorted(row["id"] for part in found.values() for row in part) == sorted(row["id"] for row in rows())
    assert found["val"][0] in rows()
    assert [set(row) for row in found["val"]] == [set(rows()[0])] * len(found["val"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["test"]["ids_sha256"] in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"already contains train\.json"):
        main(words)
    main([*words, "--overwrite"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"] == manifest["splits"]
    with pytest.raises(ConfigError, match="would be empty, as the rows form only 1 groups"):
        main([str(write_rows(tmp_path / "few.json", rows(1))), *words[1:-1], str(tmp_path / "few")])


@pytest.mark.parametrize(
    "text", ["", "train", "train=1,train=0", "train=0.5,test=0.6", "train=-1,test=2", "a b=1", "x=nan"]
)
def test_wrong_fractions(text: str) -> None:
    with pytest.raises(ConfigError, match="fractions"):
        parse_fractions(text)


@given(st.floats(0, 1, exclude_max=True), st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any))
def test_every_place_has_a_split_with_a_share(place: float, weights: list[int]) -> None:
    fractions = {f"s{number}": weight / sum(weights) for number, weight in enumerate(weights)}
    assert fractions[split_at(place, fractions)] > 0


@given(st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(0, 6), min_size=1, max_size=3)), min_size=1))
def test_connected_rows_are_never_apart(links: list[tuple[int, list[int]]]) -> None:
    data = [{"patient": patient, "image": [f"{name}.png" for name in names]} for patient, names in links]
    places = split_rows(data, SplitOptions(("patient", "image"), {"train": 1.0}))
    assert set(places) == {"train"}
    try:
        places = split_rows(data, SplitOptions(("patient", "image"), {"train": 0.5, "test": 0.5}))
    except ConfigError:  # all rows are one group, or all groups fell into one split
        return
    for field in ("patient", "image"):
        sides: dict[Any, set[str]] = {}
        for row, place in zip(data, places, strict=True):
            for key in row[field] if isinstance(row[field], list) else [row[field]]:
                sides.setdefault(key, set()).add(place)
        assert all(len(side) == 1 for side in sides.values())
