"""Tiles and tokens by image size: recorded grids, hand-made cases, and properties of every size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava.errors import ConfigError, DataError
from llava.imaging.anyres import (
    MERGE_TYPES,
    ImageGrid,
    best_size,
    fit_centered,
    keep_size,
    parse_pinpoints,
    unpadded_patches,
)
from llava.imaging.geometry import anyres_tiles

PINPOINTS = ((112, 56), (56, 112), (112, 112), (168, 56), (56, 168))
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def grid(merge: str = "flat", num_tokens: int = 16, mode: str = "anyres") -> ImageGrid:
    return ImageGrid(mode, 56, num_tokens, merge, PINPOINTS)


def test_grids_are_the_published_ones(shared: Path) -> None:
    folder = shared / "oracles" / "llava-1.2.2"
    for name, recorded in json.loads((folder / "anyres.json").read_text()).items():
        with Image.open(folder / "images" / name) as image:
            assert list(best_size(image.size, PINPOINTS)) == recorded["best"]
            assert list(grid().shape(image.size)) == recorded["grid"]


def test_shapes_of_mode_keep_are_the_published_ones(shared: Path) -> None:
    folder = shared / "oracles" / "llava-med-1.0"
    recorded = json.loads((folder / "image_keep_shapes.json").read_text())
    for name in (key.removeprefix("keep/") for key in recorded if key.startswith("keep/")):
        with Image.open(folder / "images" / name) as image:
            width, height = keep_size(image.size)
            assert [3, height, width] == recorded[f"keep/{name}"]


def test_tokens_of_an_image() -> None:
    # 80 x 56 fills 2 x 1 tiles of 4 x 4 patches but for two columns: 8 patches wide at 80 / 112 of the height ...
    assert grid("flat").count((80, 56)) == grid("spatial").count((80, 56)) == 3 * 16
    # ... 80 pixels at 4 rows for 56 are 5.7 patches, so one of the two border columns goes at each side.
    assert unpadded_patches((80, 56), (8, 4)) == (1, 0, 7, 4)
    assert grid("spatial_unpad").count((80, 56)) == 16 + 4 * (6 + 1)
    assert grid(mode="square").count((80, 56)) == grid(mode="pad").count((1, 900)) == 16
    assert grid(mode="keep").count((80, 56)) == (320 // 14) * (224 // 14)
    assert ImageGrid("keep", 56, 17).count((80, 56)) == (320 // 14) * (224 // 14) + 1


def test_mode_keep_refuses_what_is_narrower_than_a_patch() -> None:
    with pytest.raises(DataError, match=r"an image of 2000 x 20 pixels to 400 x 4, less than a patch of 14"):
        grid(mode="keep").count((2000, 20))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"merge": "max_pool"}, "mm_patch_merge_type"),
        ({"pinpoints": ()}, "got none"),
        ({"pinpoints": ((100, 56),)}, r"multiple of 56 pixels .* got \[100, 56\]"),
        ({"num_tokens": 17, "merge": "spatial"}, "17 tokens"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, object], word: str) -> None:
    values = {"mode": "anyres", "tile": 56, "num_tokens": 16, "merge": "flat", "pinpoints": PINPOINTS} | settings
    with pytest.raises(ConfigError, match=word):
        ImageGrid(**values)  # type: ignore[arg-type]


def test_pinpoints_are_read_from_a_list_and_its_text() -> None:
    assert parse_pinpoints("[(336, 672), [672, 336]]", 336) == ((336, 672), (672, 336))
    assert parse_pinpoints([[336, 672]], 336) == ((336, 672),)
    assert parse_pinpoints(None, 336) == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    for wrong in ("__import__('os')", "[1, 2]", "[[1, 2, 3]]", 7):
        with pytest.raises(ConfigError, match="not a list of"):
            parse_pinpoints(wrong, 336)


@given(SIZES)
def test_every_image_lies_inside_its_tiles(size: tuple[int, int]) -> None:
    whole = best_size(size, PINPOINTS)
    (width, height), (left, top) = fit_centered(size, whole)
    assert 0 < width <= whole[0] and 0 < height <= whole[1]
    assert left >= 0 and top >= 0 and left + width <= whole[0] and top + height <= whole[1]
    assert width == whole[0] or height == whole[1]
    columns, rows = grid().shape(size)
    x0, y0, x1, y1 = unpadded_patches(size, (columns * 4, rows * 4))
    assert 0 <= x0 <= x1 <= columns * 4 and 0 <= y0 <= y1 <= rows * 4
    assert x0 == columns * 4 - x1 and y0 == rows * 4 - y1
    for merge in MERGE_TYPES:
        assert grid(merge).count(size) >= 16
    assert grid("spatial_unpad").count(size) <= 16 + rows * 4 * (columns * 4 + 1)


@given(SIZES)
def test_mode_keep_stays_within_its_limits(size: tuple[int, int]) -> None:
    width, height = keep_size(size)
    assert 1 <= min(width, height) <= 224
    assert max(width, height) <= 448 or min(width, height) == 1
    # Sides that differ by little may become equal; the longer one never becomes the shorter.
    assert (width - height) * (size[0] - size[1]) >= 0


@pytest.mark.parametrize("size", [(20, 300), (55, 57), (300, 20), (57, 55), (80, 90), (20, 30)])
def test_the_whole_image_is_shrunk_in_one_direction_before_it_grows_in_the_other(size: tuple[int, int]) -> None:
    """Each bicubic step rounds to 8 bits, so that the order shows; the order of Pillow is width, then height."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, bicubic = Image.fromarray(noise), Image.Resampling.BICUBIC
    tile = np.asarray(anyres_tiles(image, best_size(size, PINPOINTS), 56)[0])
    height_first = image.resize((size[0], 56), bicubic).resize((56, 56), bicubic)
    width_first = image.resize((56, size[1]), bicubic).resize((56, 56), bicubic)
    is_narrow = size[1] > 56 > size[0]
    assert np.array_equal(tile, height_first if is_narrow else width_first)
    assert not np.array_equal(height_first, width_first)
