"""Decoding of image files: color modes, depth, orientation, limits, and the published values bit for bit."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.errors import ConfigError, DataError
from llava.imaging import decode
from llava.imaging.geometry import fit_image, mean_color, to_rgb

WIDTH, HEIGHT = 9, 6


def gradient(mode: str) -> Image.Image:
    """Return a small image of the given mode whose RGB form is not constant."""
    ramp = np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH) * 4
    rgb = Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], axis=-1))
    return rgb.convert(mode) if mode != "RGB" else rgb


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"), ("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"),
        ("CMYK", "jpg"), ("YCbCr", "jpg"), ("LAB", "tif"),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb_as_pillow_converts_it(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    gradient(mode).save(path)
    loaded = decode.load_image(path.name, tmp_path)
    assert (loaded.mode, loaded.size) == ("RGB", (WIDTH, HEIGHT))
    with Image.open(path) as stored:
        assert loaded.tobytes() == stored.convert("RGB").tobytes()


def test_transparency_is_dropped_and_not_composited() -> None:
    image = gradient("RGBA")
    image.putalpha(0)
    assert to_rgb(image).tobytes() == gradient("RGB").tobytes()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_windowed_from_smallest_to_largest(tmp_path: Path, suffix: str) -> None:
    values = np.array([[1000, 1000 + 51 * 200], [1000 + 255 * 200, 1000 + 128 * 200]], dtype=np.uint16)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(values).save(path)
    loaded = np.asarray(decode.load_image(path.name, tmp_path))
    assert loaded.shape == (2, 2, 3)
    assert loaded[..., 0].tolist() == loaded[..., 2].tolist() == [[0, 51], [255, 128]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_deep_and_floating_point_images_use_the_same_window(dtype: type) -> None:
    values = np.array([[-5.0, 0.0], [5.0, 5.0]]).astype(dtype)
    assert np.asarray(to_rgb(Image.fromarray(values)))[..., 1].tolist() == [[0, 128], [255, 255]]
    assert np.asarray(to_rgb(Image.fromarray(np.full((2, 2), 7, dtype)))).max() == 0


def test_values_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(DataError, match="not finite"):
        to_rgb(Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    gradient("RGB").save(path, exif=exif)
    with Image.open(path) as stored:
        expected = ImageOps.exif_transpose(stored)
        loaded = decode.load_image(path.name, tmp_path)
        assert loaded.size == expected.size == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))
        assert loaded.tobytes() == expected.tobytes()


def test_first_frame_of_several(tmp_path: Path) -> None:
    gradient("L").save(tmp_path / "x.tif", save_all=True, append_images=[Image.new("L", (WIDTH, HEIGHT))])
    assert decode.load_image("x.tif", tmp_path).tobytes() == gradient("L").convert("RGB").tobytes()


@pytest.mark.parametrize("ref", ["../secret.png", "a/../../secret.png", "link.png"])
def test_names_that_lead_outside_the_folder_are_refused(tmp_path: Path, ref: str) -> None:
    gradient("RGB").save(tmp_path / "secret.png")
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(
        DataError, match="outside the image folder.*" + ("cp -rL" if ref == "link.png" else "move or copy")
    ):
        decode.load_image(ref, root)
    with pytest.raises(DataError, match="outside the image folder"):
        decode.load_image(tmp_path / "secret.png", root)


def test_a_linked_folder_and_paths_inside_it_are_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    gradient("RGB").save(tmp_path / "real" / "x.png")
    (tmp_path / "images").symlink_to(tmp_path / "real")
    assert decode.load_image("x.png", tmp_path / "images").size == (WIDTH, HEIGHT)
    assert decode.load_image("sub/../x.png", tmp_path / "images").size == (WIDTH, HEIGHT)
    assert decode.load_image(tmp_path / "real" / "x.png").size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "missing"])
def test_a_broken_file_is_named(tmp_path: Path, damage: str) -> None:
    buffer = io.BytesIO()
    gradient("RGB").resize((200, 200)).save(buffer, "JPEG")
    content = {"cut": buffer.getvalue()[:900], "text": b"not an image", "empty": b""}
    if damage in content:
        (tmp_path / "scan.jpg").write_bytes(content[damage])
    with pytest.raises(DataError, match=r"scan\.jpg"):
        decode.load_image("scan.jpg", tmp_path)


def test_too_large_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient("RGB").save(tmp_path / "x.png")
    monkeypatch.setattr(decode, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"9 x 6 pixels, more than the limit of 53"):
        decode.load_image("x.png", tmp_path)


def test_pad_centers_with_the_offset_rounded_down() -> None:
    image = fit_image(gradient("RGB"), "pad", size=4, fill=(122, 116, 104))
    assert image.size == (WIDTH, WIDTH)
    top = (WIDTH - HEIGHT) // 2
    rows = np.asarray(image)
    assert (rows[:top] == (122, 116, 104)).all()
    assert (rows[top : top + HEIGHT] == np.asarray(gradient("RGB"))).all()
    assert (rows[top + HEIGHT :] == (122, 116, 104)).all()
    assert len(rows) - top - HEIGHT == top + 1


def test_resize_squashes_and_square_leaves_the_shape() -> None:
    assert fit_image(gradient("L"), "resize", size=4, fill=(0, 0, 0)).size == (4, 4)
    assert fit_image(gradient("L"), "resize", size=(2, 5), fill=(0, 0, 0)).size == (5, 2)
    square = fit_image(gradient("L"), "square", size=4, fill=(0, 0, 0))
    assert (square.mode, square.size) == ("RGB", (WIDTH, HEIGHT))


def test_an_unknown_mode_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'crop'; known: square, pad, resize"):
        fit_image(gradient("RGB"), "crop", size=4, fill=(0, 0, 0))


@pytest.mark.parametrize("oracle", ["llava-1.2.2", "llava-med-1.0"])
@pytest.mark.parametrize("mode", ["square", "pad"])
def test_preprocessing_equals_the_published_code_bit_for_bit(shared: Path, oracle: str, mode: str) -> None:
    folder = shared / "oracles" / oracle
    processor = CLIPImageProcessorPil.from_pretrained(folder / "vision_tower")
    fill = mean_color(processor.image_mean)
    assert fill == (122, 116, 104)
    expected = np.load(folder / "image_preprocess.npz")
    names = [name for name in expected.files if name.startswith(f"{mode}/")]
    assert len(names) == 5
    for name in names:
        image = decode.load_image(name.removeprefix(f"{mode}/"), folder / "images")
        image = fit_image(image, mode, size=56, fill=fill)
        pixels = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(pixels, expected[name])


def test_the_key_depends_on_bytes_and_preprocessing_only() -> None:
    keys = {decode.image_key(data, mark) for data in (b"a", b"b") for mark in ("square", "pad")}
    assert len(keys) == 4
    assert decode.image_key(b"a", "pad") == decode.key_of_digest(decode.content_digest(b"a"), "pad")


@pytest.mark.parametrize("ref", ["a\0b.png", "\ud800.png"])
@pytest.mark.parametrize("inside", [True, False])
def test_names_that_no_file_can_have_are_named_errors(tmp_path: Path, ref: str, inside: bool) -> None:
    with pytest.raises(DataError, match="has an invalid name"):
        decode.load_image(ref, tmp_path if inside else None)


def test_the_stored_form_is_read_from_the_header(tmp_path: Path) -> None:
    for mode, suffix, expected in [("L", "jpg", "JPEG L"), ("I;16", "png", "PNG I;16"), ("P", "gif", "GIF P")]:
        path = tmp_path / f"a.{suffix}"
        Image.new(mode, (4, 4)).save(path)
        assert decode.stored_format(path.read_bytes()) == expected
    assert decode.stored_format(b"\0" * 128 + b"DICM") == "DICOM"
    assert decode.stored_format(b"no image") == "unknown"


@pytest.fixture(params=["fifo", "folder", "socket", "device", "linked fifo", "linked device"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return the path of a file that is not a regular one; reading from most of them would wait for ever."""
    path = tmp_path / "x.png"
    target = tmp_path / "target" if request.param.startswith("linked") else path
    if "fifo" in request.param:
        os.mkfifo(target)
    elif request.param == "folder":
        target.mkdir()
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(target))
    else:
        target = Path("/dev/zero")
    if target != path:
        path.symlink_to(target)
    return target if request.param == "device" else path


@pytest.mark.parametrize("reader", [decode.read_image_bytes, decode.load_image, decode.decode_image])
def test_only_regular_files_are_read(special: Path, reader: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="expected a regular file") as caught:
        reader(special, None)
    assert "\n" not in str(caught.value)


def test_files_of_any_size_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "x.png").open("wb") as stream:
        stream.truncate(1 << 42)  # a sparse file, which takes no space
    with pytest.raises(DataError, match="4398046511104 bytes, more than the limit"):
        decode.load_image("x.png", tmp_path)
    gradient("RGB").save(tmp_path / "y.png")
    monkeypatch.setattr(decode, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="more than the limit of 10"):
        decode.load_image("y.png", tmp_path)
