"""Perceptual hashes and close pairs: small changes change few bits, and no close pair is missed."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from llava.data.check import near_duplicates
from llava.data.check.images import _COSINES, perceptual_hash, pixel_correlation, small_gray
from llava.data.check.near_duplicates import MAX_DISTANCE, ClosePairs, band_masks
from llava.data.check.report import check_file, report_summary
from llava.data.check.rules import FILE
from tests.support.check_files import check_rows, row, smooth, write_rows


def distance(first: Image.Image, second: Image.Image) -> int:
    return (perceptual_hash(small_gray(first)) ^ perceptual_hash(small_gray(second))).bit_count()


def fourier_cosines(values: np.ndarray) -> np.ndarray:
    """Return the orthonormal DCT-II of every row, from the Fourier transform of the row and its mirror image."""
    size = values.shape[1]
    spectrum = np.fft.fft(np.concatenate([values, values[:, ::-1]], axis=1))[:, :size]
    shifted = (spectrum * np.exp(-0.5j * np.pi * np.arange(size) / size)).real
    return shifted / np.sqrt(np.where(np.arange(size) == 0, 4 * size, 2 * size))


def test_the_cosine_transform_is_that_of_fourier() -> None:
    gray = np.random.default_rng(0).normal(size=(32, 32))
    expected = fourier_cosines(fourier_cosines(gray).T).T
    np.testing.assert_allclose(_COSINES @ gray @ _COSINES.T, expected[:8, :8], atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_changes_that_a_viewer_hardly_sees_change_few_bits(seed: int) -> None:
    image = smooth(seed, 128)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=60)
    variants = [
        Image.open(buffer),
        image.resize((90, 90), Image.Resampling.BICUBIC),
        image.convert("RGB"),
        ImageEnhance.Brightness(image).enhance(0.9),
    ]
    assert max(distance(image, variant) for variant in variants) <= MAX_DISTANCE
    assert distance(image, ImageOps.mirror(image)) > MAX_DISTANCE
    assert distance(image, smooth(seed + 100, 128)) > MAX_DISTANCE


def test_half_of_the_bits_are_set() -> None:
    assert perceptual_hash(small_gray(smooth(1))).bit_count() == 32
    assert perceptual_hash(np.zeros((32, 32), np.uint8)) == 0


def test_correlation() -> None:
    image = np.asarray(smooth(0))
    assert pixel_correlation(image, image) == pytest.approx(1.0)
    assert pixel_correlation(image, 255 - image) == pytest.approx(-1.0)
    flat, other = np.full((4, 4), 7, np.uint8), np.full((4, 4), 8, np.uint8)
    assert pixel_correlation(flat, flat) == 1.0 and pixel_correlation(flat, other) == 0.0


def test_bands_cover_every_bit_once() -> None:
    masks = band_masks()
    assert sum(masks) == 2**64 - 1 and len(masks) == MAX_DISTANCE + 2
    assert all(not first & second for first, second in combinations(masks, 2))


def brute_force(hashes: list[int]) -> set[tuple[int, int]]:
    places = combinations(range(len(hashes)), 2)
    return {(a, b) for a, b in places if (hashes[a] ^ hashes[b]).bit_count() <= MAX_DISTANCE}


@settings(max_examples=100, deadline=None)
@given(
    bases=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=6)), max_size=40),
    block=st.sampled_from([1, 5, 1 << 18]),
)
def test_every_close_pair_is_found_once(bases: list[int], flips: list[tuple[int, set[int]]], block: int) -> None:
    hashes = bases + [bases[which % len(bases)] ^ sum(1 << bit for bit in bits) for which, bits in flips]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "BLOCK", block)
        search = ClosePairs(np.array(hashes, dtype=np.uint64))
        found = [tuple(pair) for pairs in search for pair in pairs.tolist()]
    assert len(found) == len(set(found)) and search.num_skipped == 0
    assert set(found) == brute_force(hashes)


def test_many_hashes_against_brute_force() -> None:
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, 3000, dtype=np.uint64)
    for place in range(0, 3000, 3):  # a third lies close to another one
        bits = draw.choice(64, size=place % 7, replace=False).astype(np.uint64)
        hashes[place] = hashes[place + 1] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    close = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= MAX_DISTANCE
    expected = {tuple(pair) for pair in np.argwhere(np.triu(close, 1)).tolist()}
    found = {tuple(pair) for pairs in ClosePairs(hashes) for pair in pairs.tolist()}
    assert found == expected and len(expected) > 600


def test_what_is_not_compared_is_counted() -> None:
    search = ClosePairs(np.zeros(100, dtype=np.uint64), max_partners=10)
    found = sum(len(pairs) for pairs in search)
    assert 100 * 10 - 55 <= found < 100 * 99 / 2 and search.num_skipped > 0
    assert not list(ClosePairs(np.empty(0, dtype=np.uint64)))


def write_images(folder: Path) -> None:
    folder.mkdir()
    first = smooth(1, 200)
    first.save(folder / "a.png")
    first.resize((150, 150), Image.Resampling.BICUBIC).save(folder / "a_small.png")
    first.convert("RGB").save(folder / "a_again.png")
    smooth(2, 200).save(folder / "b.png")


def test_near_duplicates_are_grouped_with_their_twins(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    rows = [row(number, name) for number, name in enumerate(["a.png", "b.png", "a_small.png", "a_again.png", "b.png"])]
    found = check_rows(tmp_path, rows, images=tmp_path / "images")
    assert found == {"near-duplicate": [0, 2, 3], "same-picture": [0, 3]}


def test_near_duplicates_in_both_files_come_first_and_are_counted(tmp_path: Path) -> None:
    """Near-duplicates in both files may be leaks; those within one file are not."""
    write_images(tmp_path / "images")
    smooth(2, 150).save(tmp_path / "images" / "b_small.png")
    ours = write_rows(
        tmp_path / "rows.json", [row(n, name) for n, name in enumerate(["b.png", "b_small.png", "a.png"])]
    )
    report = check_file(
        ours, images=tmp_path / "images", against=write_rows(tmp_path / "test.json", [row(9, "a_small.png")])
    )
    assert [finding.other_rows for finding in report.findings.of("near-duplicate", FILE).listed] == [(0,), ()]
    shown = report_summary(report, strict=False)
    assert "2  near-duplicate images (1 of them in both files) [near-duplicate]" in shown
    assert "first: row 2 and 0 of the other file" in shown


def test_a_close_hash_alone_is_no_duplicate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images")
    monkeypatch.setattr(near_duplicates, "MIN_CORRELATION", 1.01)
    rows = [row(0, "a.png"), row(1, "a_small.png")]
    assert check_rows(tmp_path, rows, images=tmp_path / "images") == {}


def test_different_noise_on_one_image_is_not_a_near_duplicate(tmp_path: Path) -> None:
    """The small copies are similar, the pixels are not."""
    folder = tmp_path / "images"
    folder.mkdir()
    ground = np.asarray(smooth(3, 256)).astype(float)
    for number in range(2):
        noise = np.random.default_rng(number).normal(scale=40, size=ground.shape)
        Image.fromarray(np.clip(ground + noise, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    assert distance(Image.open(folder / "0.png"), Image.open(folder / "1.png")) <= MAX_DISTANCE
    assert check_rows(tmp_path, [row(0, "0.png"), row(1, "1.png")], images=folder) == {}


@pytest.mark.parametrize(
    ("noise", "is_reported"),
    [(2.0, True), (4.0, True), (6.0, True), (7.0, True), (7.5, False), (9.0, False), (12.0, False)],
)
def test_near_duplicates_correlate_at_least_to_99_percent(tmp_path: Path, noise: float, is_reported: bool) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    ground = np.asarray(smooth(3, 256)).astype(float)
    for number in range(2):
        grain = number * np.random.default_rng(0).normal(scale=noise, size=ground.shape)
        Image.fromarray(np.clip(ground + grain, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    both = [np.asarray(Image.open(folder / f"{number}.png")) for number in range(2)]
    exact = np.corrcoef(*(image.ravel().astype(float) for image in both))[0, 1]
    assert bool(exact >= 0.99) is is_reported and pixel_correlation(*both) == pytest.approx(exact, abs=1e-3)
    found = check_rows(tmp_path, [row(0, "0.png"), row(1, "1.png")], images=folder)
    assert ("near-duplicate" in found) is is_reported


def test_a_smooth_change_that_the_small_copies_show_is_still_compared(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    ground, other = (np.asarray(smooth(seed, 256)).astype(float) for seed in (3, 8))
    for number in range(2):
        changed = ground + 0.08 * number * (other - other.mean())
        Image.fromarray(np.clip(changed, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    both = [Image.open(folder / f"{number}.png") for number in range(2)]
    assert 0.992 < pixel_correlation(*map(small_gray, both)) < 0.9985
    assert "near-duplicate" in check_rows(tmp_path, [row(0, "0.png"), row(1, "1.png")], images=folder)


def test_the_number_of_compared_pairs_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images")
    monkeypatch.setattr(near_duplicates, "MAX_CONFIRMED", 0)
    report = check_file(
        write_rows(tmp_path / "rows.json", [row(0, "a.png"), row(1, "a_small.png")]), images=tmp_path / "images"
    )
    assert report.num_uncompared == 1
