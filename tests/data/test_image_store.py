"""Index and store of images: equal bytes are equal images, each decoded once."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from llava.data import image_store
from llava.data.encode import Encoded
from llava.data.feature_cache import build_feature_cache
from llava.data.image_store import ImageIndex, ImageStore, hide_names, show_names
from llava.errors import DataError
from llava.imaging import decode
from llava.imaging.dicom.policy import DEFAULT_POLICY
from llava.utils.files import cache_folder


class Processor:
    """Processor whose pixels are the mean color; it counts its images."""

    image_fingerprint = "test"
    dicom = DEFAULT_POLICY
    has_variable_images = False

    def __init__(self) -> None:
        self.num = 0

    def open(self, ref: str, root: Path | None) -> Image.Image:
        return decode.load_image(ref, root)

    def preprocess(self, image: Image.Image) -> Tensor:
        self.num += 1
        return torch.tensor(np.asarray(image).mean(axis=(0, 1)), dtype=torch.float32).view(3, 1, 1)


def paint(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path)


def encoded(*keys: str) -> Encoded:
    return Encoded((1,), (-100,), (0,), images=keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        paint(tmp_path / "images" / f"{number}.png", number)
    paint(tmp_path / "images" / "sub" / "copy.png", 0)
    return tmp_path / "images"


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    original = decode.read_image_bytes

    def read(ref: Any, root: Any) -> bytes:
        seen.append(str(ref))
        return original(ref, root)

    monkeypatch.setattr(decode, "read_image_bytes", read)
    return seen


def test_equal_bytes_have_equal_keys_whatever_their_name(folder: Path) -> None:
    store = ImageStore(ImageIndex(folder), Processor())
    assert store.key("0.png") == store.key("sub/copy.png") != store.key("1.png")
    assert store.key("0.png") == decode.image_key((folder / "0.png").read_bytes(), "test")


def test_an_image_of_a_step_is_decoded_once(folder: Path) -> None:
    processor = Processor()
    store = ImageStore(ImageIndex(folder), processor)
    keys = [store.key(f"{number}.png") for number in range(3)]
    found = store.images_for([encoded(keys[2], keys[0]), encoded(), encoded(keys[2]), encoded(keys[1])])
    assert list(found) == [keys[2], keys[0], keys[1]]
    assert [int(pixels[0, 0, 0]) for pixels in found.values()] == [2, 0, 1]
    assert processor.num == 3
    store.images_for([encoded(keys[1])])
    assert processor.num == 3


def test_the_memory_is_bounded_and_forgets_the_least_recent(folder: Path) -> None:
    processor = Processor()
    store = ImageStore(ImageIndex(folder), processor, capacity=2)
    keys = [store.key(f"{number}.png") for number in range(3)]
    for key in (keys[0], keys[1], keys[0], keys[2]):
        store.pixels(key)
    assert processor.num == 3
    store.pixels(keys[0])
    assert processor.num == 3
    store.pixels(keys[1])
    assert processor.num == 4


def test_an_unknown_key_is_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match="is unknown; it belongs to another"):
        ImageStore(ImageIndex(folder), Processor()).images_for([encoded("nothing")])


def test_cached_features_replace_pixels_for_all_or_none(folder: Path, tmp_path: Path) -> None:
    processor = Processor()
    store = ImageStore(ImageIndex(folder), processor)
    keys = [store.key(f"{number}.png") for number in range(3)]

    def features(pixels: Tensor) -> Tensor:
        return pixels.view(-1, 1, 3) + 0.5

    store.features = build_feature_cache(tmp_path, keys[:2], tower="t", pixels=store.decode, features=features)
    num = processor.num
    found = store.images_for([encoded(*keys[:2])])
    assert [tensor.shape for tensor in found.values()] == [(1, 3), (1, 3)]
    assert found[keys[1]][0, 0] == 1.5
    assert processor.num == num
    with pytest.raises(DataError, match="only some of the images"):
        store.images_for([encoded(*keys)])


def test_a_store_is_pickled_without_its_images(folder: Path) -> None:
    store = ImageStore(ImageIndex(folder), Processor())
    key = store.key("3.png")
    store.pixels(key)
    other = pickle.loads(pickle.dumps(store))
    assert not other._recent
    assert torch.equal(other.pixels(key), store.pixels(key))


def test_verify_names_what_does_not_decode(folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    index = ImageIndex(folder)
    bad = index.verify(["0.png", "1.png", "gone.png", "../x.png"], num_threads=3)
    assert list(bad) == ["1.png", "gone.png", "../x.png"]
    assert "1.png cannot be decoded" in bad["1.png"]
    assert "gone.png cannot be read: No such file" in bad["gone.png"]
    assert "outside the image folder" in bad["../x.png"]
    assert len(index.digest("0.png")) == 64
    for ref, reason in bad.items():
        with pytest.raises(DataError) as caught:
            index.digest(ref)
        assert str(caught.value) == reason


def test_a_second_run_looks_only_at_time_and_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "2.png").write_text("broken")
    refs = [f"{number}.png" for number in range(6)]
    path = tmp_path / "cache" / "index.json"
    first = ImageIndex(folder, path).verify(refs)
    assert list(first) == ["2.png"]
    reads = count_reads(monkeypatch)
    index = ImageIndex(folder, path)
    assert index.verify(refs) == first
    assert [index.digest(ref) for ref in refs if ref != "2.png"]
    assert reads == []
    paint(folder / "2.png", 2)
    os.utime(folder / "4.png", ns=(1, 1))
    assert ImageIndex(folder, path).verify(refs) == {}
    assert sorted(reads) == ["2.png", "4.png"]


def test_a_file_that_could_not_be_read_is_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(ref: Any, root: Any) -> bytes:
        raise DataError(f"image {ref} cannot be read: Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(decode, "read_image_bytes", refuse)
        assert list(ImageIndex(folder, tmp_path / "index.json").verify(["0.png"])) == ["0.png"]
    assert ImageIndex(folder, tmp_path / "index.json").verify(["0.png"]) == {}


def test_a_digest_alone_does_not_count_as_decoded(folder: Path, tmp_path: Path) -> None:
    (folder / "5.png").write_text("broken")
    index = ImageIndex(folder, tmp_path / "index.json")
    assert len(index.digest("5.png")) == 64
    assert list(index.verify(["5.png"])) == ["5.png"]


@pytest.mark.parametrize("content", ["{", '{"version": 0}', '{"version": VERSION, "files": {"a": [1]}}', "[]"])
def test_a_damaged_index_is_made_again(folder: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "index.json"
    path.write_text(content.replace("VERSION", f'"{image_store.INDEX_VERSION}"'))
    assert ImageIndex(folder, path).verify(["0.png"]) == {}
    assert len(json.loads(path.read_text())["files"]) == 1


@pytest.mark.parametrize("name", ["Jane Roe.png", "roe/0.png", "r\u00f6.png", 'a"b.png', "x\n.png"])
def test_the_stored_index_names_neither_files_nor_folders(folder: Path, tmp_path: Path, name: str) -> None:
    paint(folder / name, 9)
    broken = f"{name}.broken.png"
    (folder / broken).write_text("broken")
    path = tmp_path / "index.json"
    bad = ImageIndex(folder, path).verify([name, broken, "gone.png"])
    stored = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    for text in (name, broken, folder.name, "Roe", "roe", "gone", json.dumps(name)[1:-1]):
        assert text not in stored
    assert ImageIndex(folder, path).verify([name, broken, "gone.png"]) == bad
    assert name in bad[broken] or repr(name)[1:-1] in bad[broken]


@given(st.text(max_size=30), st.lists(st.text(max_size=6), max_size=4))
def test_names_of_a_message_are_hidden_and_restored(text: str, names: list[str]) -> None:
    assume(not any("\ue000" <= letter <= "\uf8ff" for letter in text + "".join(names)))
    message = text.join(names)
    hidden = hide_names(message, names)
    assert show_names(hidden, names) == message
    assert not [name for name in names if name and name in hidden]


def test_an_index_that_cannot_be_written_costs_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert ImageIndex(folder, tmp_path / "file" / "index.json").verify(["0.png"]) == {}
    assert "cannot be written" in caplog.text


def test_each_folder_has_its_index_in_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    ImageIndex.open(folder).verify(["0.png"])
    ImageIndex.open(folder / "sub").verify(["copy.png"])
    assert len(list((tmp_path / "cache" / "images").glob("*.json"))) == 2
    monkeypatch.setattr(image_store, "INDEX_VERSION", "another")
    reads = count_reads(monkeypatch)
    ImageIndex.open(folder).verify(["0.png"])
    assert reads == ["0.png"]


def verify_in_turn(root: str, index: str, counts: str) -> None:
    num = 0
    original = decode.read_image_bytes

    def read(ref: Any, folder: Any) -> bytes:
        nonlocal num
        num += 1
        time.sleep(0.02)
        return original(ref, folder)

    decode.read_image_bytes = read
    assert ImageIndex(root, index).verify([f"{number}.png" for number in range(6)], num_threads=1) == {}
    with open(counts, "a") as lines:
        lines.write(f"{num}\n")


def test_processes_that_start_together_decode_each_image_once(folder: Path, tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    context = multiprocessing.get_context("fork")
    arguments = (str(folder), str(tmp_path / "index.json"), str(counts))
    workers = [context.Process(target=verify_in_turn, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=900)
    assert sorted(counts.read_text().split()) == ["0", "0", "6"]


def test_what_was_checked_before_an_interruption_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = decode.read_image_bytes

    def read(ref: Any, root: Any) -> bytes:
        if ref == "4.png":
            raise KeyboardInterrupt
        return original(ref, root)

    refs = [f"{number}.png" for number in range(6)]
    monkeypatch.setattr(decode, "read_image_bytes", read)
    with pytest.raises(KeyboardInterrupt):
        ImageIndex(folder, tmp_path / "index.json").verify(refs, num_threads=1)
    monkeypatch.setattr(decode, "read_image_bytes", original)
    reads = count_reads(monkeypatch)
    assert ImageIndex(folder, tmp_path / "index.json").verify(refs) == {}
    assert "4.png" in reads and "0.png" not in reads


def test_an_image_replaced_by_one_of_the_same_time_and_size_is_noticed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    name = folder / "same.bmp"
    digests = []
    for color in (10, 200):
        Image.new("RGB", (4, 4), (color, 0, 0)).save(name)
        os.utime(name, ns=(1, 1))
        index = ImageIndex(folder, path)
        assert index.verify(["same.bmp"]) == {}
        digests.append(index.digest("same.bmp"))
    assert digests[0] != digests[1]
