"""Shared part of the dataset converters: resuming, settings, limits, links, hashes and ids."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llava.data.converters import csv_table, slake, vqa_rad
from llava.data.converters.base import Converter, Job, run_converter
from llava.data.converters.dataset_cards import DatasetCard
from llava.data.converters.items import ConvertedItem, make_row
from llava.data.converters.output import ConverterOutput, ImageWriter, split_hash
from llava.errors import ConfigError, DataError
from llava.samples import Origin
from tests.support import releases
from tests.support.releases import image_bytes, rows_in, write_csv, write_image

ROOT = Path(__file__).resolve().parents[3]


def item(identity: str, image: Path | bytes, name: str, **meta: Any) -> ConvertedItem:
    return ConvertedItem(identity, "train", "What?", "That.", image, name, meta, Origin("file", 3))


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = releases.slake(tmp_path / "raw"), tmp_path / "out"
    slake.main([str(raw), "--out", str(out)])
    before = (out / "train.json").stat().st_mtime_ns
    first = capsys.readouterr().out
    slake.main([str(raw), "--out", str(out)])
    again = capsys.readouterr().out
    assert "already complete" in again and first in again
    assert (out / "train.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="written with another lang; choose another --out or pass --overwrite"):
        slake.main([str(raw), "--out", str(out), "--lang", "zh"])
    slake.main([str(raw), "--out", str(out), "--lang", "zh", "--overwrite"])
    assert rows_in(out / "train.json")[0]["q_lang"] == "zh"


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    raw = releases.slake(tmp_path / "raw")
    with pytest.raises(ConfigError, match="is the downloaded folder itself"):
        slake.main([str(raw), "--out", str(raw), "--overwrite"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"contains train\.json of another origin"):
        slake.main([str(raw), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "train.json").read_text() == "mine"
    (tmp_path / "out" / ".unfinished").touch()  # a run that was killed between the split files and the manifest
    slake.main([str(raw), "--out", str(tmp_path / "out")])
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_overwriting_removes_old_splits(tmp_path: Path) -> None:
    table = write_csv(
        tmp_path / "t.csv", [{"f": "a.png", "a": "x", "s": "test"}, {"f": "a.png", "a": "y", "s": "train"}]
    )
    write_image(tmp_path / "a.png")
    words = [str(table), "--image_column", "f", "--answer_column", "a", "--image_root", str(tmp_path)]
    out = tmp_path / "out"
    csv_table.main([*words, "--split_column", "s", "--out", str(out)])
    assert (out / "test.json").exists()
    csv_table.main([*words, "--out", str(out), "--overwrite"])
    assert not (out / "test.json").exists() and len(rows_in(out / "train.json")) == 2


def test_killed_and_started_again_gives_the_same_files(tmp_path: Path) -> None:
    """A run that is killed by SIGKILL is completed by the next one."""
    code = (
        "import os, signal, sys\n"
        "from llava.data.converters import output, slake\n"
        "real, left = output.ImageWriter.place, [2]\n"
        "def place(self, name, image):\n"
        "    real(self, name, image)\n"
        "    left[0] -= 1\n"
        "    if not left[0]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "output.ImageWriter.place = place\n"
        "slake.main(sys.argv[1:])\n"
    )
    raw = releases.slake(tmp_path / "raw")
    words = [str(raw), "--lang", "all", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not list((tmp_path / "out").glob("*.json"))
    kept = next((tmp_path / "out" / "images").rglob("*.jpg")).stat()
    time.sleep(0.01)
    slake.main(words)
    slake.main([*words[:-1], str(tmp_path / "whole")])
    for split in ("train", "val", "test"):
        assert (tmp_path / "out" / f"{split}.json").read_bytes() == (tmp_path / "whole" / f"{split}.json").read_bytes()
    assert os.path.samestat(kept, (tmp_path / "out" / "images" / "xmlab0" / "source.jpg").stat())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir() if not path.name.startswith(".")
    )


@pytest.mark.parametrize("placement", ["link", "copy"])
def test_images_are_linked_or_copied(tmp_path: Path, placement: str) -> None:
    raw, out = releases.slake(tmp_path / "raw"), tmp_path / "out"
    slake.main([str(raw), "--out", str(out), "--images", placement])
    there, here = raw / "imgs/xmlab0/source.jpg", out / "images/xmlab0/source.jpg"
    assert here.read_bytes() == there.read_bytes() and not here.is_symlink()
    assert here.samefile(there) == (placement == "link")


def test_images_that_cannot_be_linked_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    ImageWriter(tmp_path / "images", "link").place("a/b.png", write_image(tmp_path / "b.png"))
    assert (tmp_path / "images/a/b.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_an_image_name_means_one_image(tmp_path: Path) -> None:
    images = ImageWriter(tmp_path / "images", "link")
    images.place("a.png", image_bytes(1))
    images.place("a.png", image_bytes(1))
    with pytest.raises(DataError, match=r"two different images have the name a\.png"):
        images.place("a.png", image_bytes(2))
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "a.png"]


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "a/../../b.png", "", "a//b.png", "./a.png"])
def test_image_names_stay_inside_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is not a plain relative path"):
        ImageWriter(tmp_path / "images", "link").place(name, image_bytes(1))
    assert not list(tmp_path.rglob("*"))


def test_a_changed_image_is_replaced(tmp_path: Path) -> None:
    ImageWriter(tmp_path / "images", "copy").place("a.png", write_image(tmp_path / "a.png", 1))
    write_image(tmp_path / "a.png", 2)
    os.utime(tmp_path / "a.png", ns=(1, 1))
    ImageWriter(tmp_path / "images", "copy").place("a.png", tmp_path / "a.png")
    assert (tmp_path / "images/a.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_limit_and_expected_hashes(tmp_path: Path) -> None:
    raw = releases.vqa_rad(tmp_path / "raw")
    vqa_rad.main([str(raw), "--out", str(tmp_path / "one"), "--limit", "1"])
    assert [len(rows_in(tmp_path / "one" / f"{split}.json")) for split in ("train", "test")] == [1, 1]
    assert json.loads((tmp_path / "one/manifest.json").read_text())["compared_with_published"] == []
    vqa_rad.main([str(raw), "--out", str(tmp_path / "all")])
    vqa_rad.main([str(raw), "--out", str(tmp_path / "same"), "--expect", str(tmp_path / "all")])
    with pytest.raises(DataError, match=r"the ids of train, test differ from those of the --expect manifest"):
        vqa_rad.main([str(raw), "--out", str(tmp_path / "x"), "--expect", str(tmp_path / "one/manifest.json")])
    with pytest.raises(ConfigError, match="--limit must be at least 1"):
        vqa_rad.main([str(raw), "--out", str(tmp_path / "y"), "--limit", "0"])


def test_pinned_hashes_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def read_events(job: Job) -> Any:
        job.variant = "v"
        yield item("1", image_bytes(), "a.png")

    (tmp_path / "raw").mkdir()
    for number, (pin, word) in enumerate({split_hash(["1"]): "equal", "0" * 64: "DIFFER"}.items()):
        card = DatasetCard("set", "home", "free", "take it", pins={"v": {"train": pin}})
        run_converter(
            Converter("set", card, read_events), [str(tmp_path / "raw"), "--out", str(tmp_path / str(number))]
        )
        shown = capsys.readouterr().out
        assert "published split hashes: " in shown and word in shown


def test_split_hash_is_that_of_the_sorted_ids() -> None:
    # printf 'a\nb\n' | sha256sum
    assert split_hash(["b", "a"]) == "911169ddaaf146aff539f58c26c489af3b892dff0fe283c1c264c65ae5aa59a2"


def test_repeated_ids_get_numbers(tmp_path: Path) -> None:
    with ConverterOutput(tmp_path) as output:
        for identity in ("a", "a", "a_2", "a", "b"):
            output.add(item(identity, image_bytes(), "a.png"))
        manifest = output.finish({})
    ids = [row["id"] for row in rows_in(tmp_path / "train.json")]
    assert len(set(ids)) == 5 and ids[0] == "a" and ids[4] == "b"
    assert manifest["renamed_ids"] == 3


def test_empty_fields_are_not_written() -> None:
    good = item("1", b"", "a.png", organ=None, choices=[], view="AP", count=0)
    assert {name for name in make_row(good)} == {"id", "image", "conversations", "view", "count"}


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("", "x", "the question is empty"),
        ("x", "", "the answer is empty"),
        ("<image> x", "y", "the question contains the image placeholder"),
        ("x", "<image>", "the answer contains the image placeholder"),
    ],
)
def test_rows_without_text_or_with_a_placeholder_are_refused(question: str, answer: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        make_row(ConvertedItem("1", "train", question, answer, b"", "a.png", {}, Origin("f", 0)))


def test_an_output_without_rows_is_an_error(tmp_path: Path) -> None:
    with (
        ConverterOutput(tmp_path, skip_bad=True) as output,
        pytest.raises(DataError, match=r"no row can be used.*file, row 3"),
    ):
        output.add(item("1", tmp_path / "missing.png", "a.png"))
        output.finish({})
    assert not list(tmp_path.glob("*.json"))
