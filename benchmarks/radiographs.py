"""Synthetic images for benchmarks of loading, as hard to resize as real X-ray images.

seed, size --film--> gray image: lungs, ribs, vessels, burned-in text, cables, noise --as_jpeg ...--> bytes of a file
"""

from __future__ import annotations

import io
import math
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

NOISE = 4.0
"""Standard deviation of noise in gray levels; with quality 92, files have a quarter byte per pixel, as real ones."""


def film(width: int, height: int, seed: int) -> Image.Image:
    """Return a gray image like a chest X-ray: smooth shadows, thin structures, sharp letters, noise."""
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    u, v = x / width - 0.5, y / height - 0.5
    gray = 150 - 220 * (u * u + v * v) + 40 * np.exp(-((u / 0.04) ** 2))
    for side in (-0.2, 0.2):
        gray -= 90 * np.exp(-(((u - side) / 0.13) ** 4 + ((v + 0.02) / 0.3) ** 4))
    for number in range(10):
        distance = v + 0.4 - 0.08 * number - 0.8 * (np.abs(u) - 0.2) ** 2
        gray += 14 * np.exp(-((distance / 0.008) ** 2)) * (np.abs(u) < 0.4)
    coarse = noise.normal(0, 6, (height // 8 + 1, width // 8 + 1)).astype(np.float32)
    gray += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    image = _levels(gray)
    _draw(image, random.Random(seed))
    return _levels(np.asarray(image, dtype=np.float32) + noise.normal(0, NOISE, (height, width)))


def _levels(values: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _draw(image: Image.Image, draw: random.Random) -> None:
    """Draw vessels, a cable, a frame and the letters of a technician."""
    width, height = image.size
    pen = ImageDraw.Draw(image)
    step = width / 100
    for _ in range(150):
        point, angle = (draw.random() * width, draw.random() * height), draw.random() * math.tau
        level = int(image.getpixel((int(point[0]), int(point[1])))) + draw.choice((-25, 25, 40))  # type: ignore[arg-type]
        points = [point]
        for _ in range(12):
            angle += draw.gauss(0, 0.3)
            points.append((points[-1][0] + step * math.cos(angle), points[-1][1] + step * math.sin(angle)))
        pen.line(points, fill=min(max(level, 0), 255), width=draw.choice((1, 2, 3, 5)))
    pen.line([(width * 0.5, 0), (width * 0.55, height * 0.5), (width * 0.5, height * 0.8)], fill=235, width=5)
    pen.rectangle((width * 0.7, height * 0.03, width * 0.8, height * 0.1), outline=255, width=6)
    pen.text((width * 0.04, height * 0.04), "L", fill=255, font=ImageFont.load_default(size=width // 14))
    pen.text((width * 0.5, height * 0.94), "PORTABLE AP 90", fill=250, font=ImageFont.load_default(size=width // 28))


def figure(width: int, height: int, seed: int) -> Image.Image:
    """Return a color image like a figure of a paper: a stained slide beside a plot."""
    noise = np.random.default_rng(seed)
    cells = noise.normal(0, 1, (height // 12 + 1, width // 12 + 1, 3)).astype(np.float32)
    planes = [Image.fromarray(cells[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
    values = np.stack([np.asarray(plane) for plane in planes], axis=-1) * 25 + (200, 140, 190)
    image = Image.fromarray(np.clip(values + noise.normal(0, 3, values.shape), 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    pen.rectangle((width * 0.6, 0, width, height), fill="white")
    heights = noise.random(12)
    for number, share in enumerate(heights):
        left = width * (0.63 + 0.03 * number)
        pen.rectangle((left, height * (0.9 - 0.7 * share), left + width * 0.02, height * 0.9), fill=(40, 90, 160))
    pen.text((width * 0.64, height * 0.03), "Figure 1 (b)", fill="black", font=ImageFont.load_default(size=width // 30))
    return image


def as_jpeg(image: Image.Image, quality: int = 92, **settings: Any) -> bytes:
    """Return a JPEG file."""
    return _saved(image, "JPEG", quality=quality, **settings)


def as_png(image: Image.Image) -> bytes:
    """Return a PNG file."""
    return _saved(image, "PNG")


def _saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def as_deep(image: Image.Image, seed: int) -> NDArray[np.uint16]:
    """Return values [H, W] with 12 significant bits, as a detector gives them."""
    exact = np.asarray(image, dtype=np.uint16) * 16
    return exact + np.random.default_rng(seed).integers(0, 16, exact.shape, dtype=np.uint16)


def as_deep_png(image: Image.Image, seed: int) -> bytes:
    """Return a PNG file of 16 bits."""
    return as_png(Image.fromarray(as_deep(image, seed)))


def as_dicom(image: Image.Image, seed: int) -> bytes:
    """Return an uncompressed 16-bit DICOM file without patient data and without a window."""
    values = as_deep(image, seed)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{seed + 1}"
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PhotometricInterpretation = "DX", "MONOCHROME2"
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelData = values.tobytes()
    dataset["PixelData"].VR = "OW"
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()
