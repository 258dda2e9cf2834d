"""Cache of tower features: exact, resumable, bounded, safe for several processes."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava.data import feature_cache
from llava.data.feature_cache import FeatureCache, build_feature_cache, weights_hash
from llava.errors import ConfigError, DataError

PATCHES, WIDTH = 4, 6
KEYS = [f"{number:032x}" for number in range(10)]


def pixels_of(key: str) -> Tensor:
    return torch.full((3, 2, 2), float(int(key, 16)))


class Tower:
    """Fake tower whose features identify their image; it counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float32, stop_after: int = 10**9) -> None:
        self.dtype = dtype
        self.num = 0
        self.stop_after = stop_after

    def __call__(self, images: Tensor) -> Tensor:
        self.num += len(images)
        if self.num > self.stop_after:
            raise KeyboardInterrupt
        steps = torch.linspace(0, 1, PATCHES * WIDTH).view(1, PATCHES, WIDTH)
        return (images.mean(dim=(1, 2, 3)).view(-1, 1, 1) + steps).to(self.dtype)


def expected(key: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return Tower(dtype)(pixels_of(key)[None])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cached_features_are_the_computed_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = build_feature_cache(tmp_path, KEYS, tower="t", pixels=pixels_of, features=Tower(dtype), batch_size=3)
    assert len(cache) == len(KEYS)
    assert cache.num_bytes == 10 * PATCHES * WIDTH * dtype.itemsize
    for key in reversed(KEYS):
        found = cache.get(key)
        assert found.dtype == dtype
        assert torch.equal(found, expected(key, dtype))


def test_what_is_returned_may_be_changed(tmp_path: Path) -> None:
    cache = build_feature_cache(tmp_path, KEYS[:2], tower="t", pixels=pixels_of, features=Tower())
    cache.get(KEYS[1]).zero_()
    assert torch.equal(cache.get(KEYS[1]), expected(KEYS[1]))


def test_a_second_build_computes_only_what_is_missing(tmp_path: Path) -> None:
    tower = Tower()
    build_feature_cache(tmp_path, KEYS[:4] + KEYS[:2], tower="t", pixels=pixels_of, features=tower)
    assert tower.num == 4
    cache = build_feature_cache(tmp_path, KEYS[2:7], tower="t", pixels=pixels_of, features=tower)
    assert (tower.num, len(cache)) == (7, 7)
    assert all(torch.equal(cache.get(key), expected(key)) for key in KEYS[:7])
    build_feature_cache(tmp_path, KEYS[:7], tower="t", pixels=pixels_of, features=tower)
    assert tower.num == 7


def test_towers_and_storage_types_do_not_mix(tmp_path: Path) -> None:
    first = build_feature_cache(tmp_path, KEYS[:2], tower="a" * 64, pixels=pixels_of, features=Tower())
    other = build_feature_cache(tmp_path, KEYS[:1], tower="b" * 64, pixels=pixels_of, features=Tower())
    half = build_feature_cache(
        tmp_path, KEYS[:3], tower="a" * 64, pixels=pixels_of, features=Tower(), dtype=torch.float16
    )
    assert len({first.folder, other.folder, half.folder}) == 3
    assert half.get(KEYS[2]).dtype == torch.float16
    with pytest.raises(DataError, match="is not in feature cache"):
        other.get(KEYS[1])


@pytest.mark.parametrize("tail", ["", "00000", "\n"])
def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, tail: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_feature_cache(tmp_path, KEYS, tower="t", pixels=pixels_of, features=Tower(stop_after=6), batch_size=2)
    folder = tmp_path / "tower-t"
    with (folder / "keys.txt").open("a") as lines:
        lines.write(tail.removesuffix("\n"))
    with (folder / "features.bin").open("ab") as data:
        data.write(b"half a row")
    tower = Tower()
    cache = build_feature_cache(tmp_path, KEYS, tower="t", pixels=pixels_of, features=tower, batch_size=3)
    assert tower.num == 4
    assert all(torch.equal(cache.get(key), expected(key)) for key in KEYS)
    assert len((folder / "keys.txt").read_text().splitlines()) == 10


def test_too_large_is_refused_with_the_needed_size_before_anything_is_written(tmp_path: Path) -> None:
    limit = 9.5 * PATCHES * WIDTH * 4 / 1e9
    tower = Tower()
    with pytest.raises(ConfigError, match=r"10 images need 0\.00 GB.*--feature-cache-gb"):
        build_feature_cache(tmp_path, KEYS, tower="t", pixels=pixels_of, features=tower, limit_gb=limit, batch_size=1)
    assert tower.num == 1
    assert not (tmp_path / "tower-t" / "features.bin").exists()
    assert (
        len(build_feature_cache(tmp_path, KEYS[:9], tower="t", pixels=pixels_of, features=tower, limit_gb=limit)) == 9
    )
    with pytest.raises(ConfigError, match="10 images need"):
        build_feature_cache(tmp_path, KEYS, tower="t", pixels=pixels_of, features=tower, limit_gb=limit)


def test_rows_without_images_need_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no row has an image"):
        build_feature_cache(tmp_path, [], tower="t", pixels=pixels_of, features=Tower())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="are free"):
        build_feature_cache(tmp_path, KEYS, tower="t", pixels=pixels_of, features=Tower())


def test_an_image_that_fails_fails_the_build(tmp_path: Path) -> None:
    def broken(key: str) -> Tensor:
        if key == KEYS[7]:
            raise DataError("image seven is broken")
        return pixels_of(key)

    with pytest.raises(DataError, match="seven"):
        build_feature_cache(tmp_path, KEYS, tower="t", pixels=broken, features=Tower(), batch_size=2)
    assert len(FeatureCache(tmp_path / "tower-t")) == 6


def test_damage_is_noticed(tmp_path: Path) -> None:
    cache = build_feature_cache(tmp_path, KEYS, tower="t", pixels=pixels_of, features=Tower())
    (cache.folder / "features.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="damaged"):
        FeatureCache(cache.folder)
    (cache.folder / "header.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        FeatureCache(cache.folder)


def test_features_of_another_shape_are_refused(tmp_path: Path) -> None:
    build_feature_cache(tmp_path, KEYS[:1], tower="t", pixels=pixels_of, features=Tower())
    with pytest.raises(DataError, match="holds other features"):
        build_feature_cache(tmp_path, KEYS, tower="t", pixels=pixels_of, features=Tower(torch.float16))


def test_pickled_and_removed(tmp_path: Path) -> None:
    cache = build_feature_cache(tmp_path, KEYS, tower="t", pixels=pixels_of, features=Tower())
    cache.get(KEYS[0])
    blob = pickle.dumps(cache)
    assert len(blob) < 2000
    assert torch.equal(pickle.loads(blob).get(KEYS[3]), expected(KEYS[3]))
    cache.remove()
    assert not cache.folder.exists()


def slow_build(root: str, counts: str) -> None:
    tower = Tower()

    def features(images: Tensor) -> Tensor:
        time.sleep(0.02)
        return tower(images)

    cache = build_feature_cache(root, KEYS, tower="t", pixels=pixels_of, features=features, batch_size=1, num_threads=1)
    assert all(torch.equal(cache.get(key), expected(key)) for key in KEYS)
    with open(counts, "a") as lines:
        lines.write(json.dumps(tower.num) + "\n")


def test_processes_take_turns_and_build_once(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=slow_build, args=(str(tmp_path), str(counts))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=900)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(json.loads(line) for line in counts.read_text().splitlines()) == [0, 0, 10]


def test_the_hash_tells_weights_names_and_settings_apart() -> None:
    weights = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.arange(6.0)}
    assert weights_hash(weights, {"layer": -2}) == weights_hash(same, {"layer": -2})
    others = [
        weights_hash(weights, {"layer": -1}),
        weights_hash({**weights, "a": torch.arange(6.0) + 1e-6}, {"layer": -2}),
        weights_hash({**weights, "a": torch.arange(6.0).view(2, 3)}, {"layer": -2}),
        weights_hash({**weights, "b": torch.ones(2)}, {"layer": -2}),
        weights_hash({"c": weights["a"], "b": weights["b"]}, {"layer": -2}),
    ]
    assert len({weights_hash(weights, {"layer": -2}), *others}) == 6
