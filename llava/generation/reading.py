"""Prompts to model inputs: tokens, and the pixels of images that are told apart by their content.

Prompt --Source--> Encoded + image keys --PromptReader.pixels--> [3, H, W] of each key, decoded once a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from llava.data.dicom_policy import DicomPolicy
from llava.data.encode import Encoded, encode, encode_prompt
from llava.data.images import image_key, load, read_bytes, to_rgb
from llava.errors import DataError
from llava.generation.protocol import ImageRef, Prompt
from llava.image_grids import Size
from llava.processing import LlavaMedProcessor


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a prompt: its identity as model input, what it is decoded from, its size where that decides."""

    key: str
    content: bytes | Image.Image
    size: Size | None = None

    def decode(self, dicom: DicomPolicy) -> Image.Image:
        """The picture in RGB; a DICOM file as the policy shows it.

        Raises:
            DataError: the bytes are no picture.
        """
        return load(self.content, dicom=dicom) if isinstance(self.content, bytes) else to_rgb(self.content)


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as the model reads it."""

    encoded: Encoded
    pictures: tuple[Picture, ...]


class PromptReader:
    """Reads prompts for one model."""

    def __init__(self, processor: LlavaMedProcessor, *, max_tokens: int) -> None:
        """Use the processor's template and preprocessing; prompts of `max_tokens` or more are refused."""
        self.processor = processor
        self.max_tokens = max_tokens

    def read(self, prompt: Prompt) -> Reading:
        """Return tokens and pictures of a prompt, opened for the answer.

        Raises:
            DataError: an image is missing, marks and images differ in number, or the prompt is too long.
        """
        pictures = tuple(self._picture(image) for image in prompt.images)
        keys = [picture.key for picture in pictures]
        encoded = encode_prompt(prompt.conversation, self.processor, images=keys, sizes=sizes_of(pictures))
        self._check_length(encoded, self.max_tokens - 1)
        return Reading(encoded, pictures)

    def read_answered(self, prompt: Prompt) -> Reading:
        """Return tokens, labels and pictures of a conversation that holds its answers.

        Raises:
            DataError: as `read`.
        """
        pictures = tuple(self._picture(image) for image in prompt.images)
        keys = [picture.key for picture in pictures]
        sizes = sizes_of(pictures)
        encoded = encode(prompt.conversation, self.processor, images=keys, sizes=sizes, max_length=None)
        self._check_length(encoded, self.max_tokens)
        return Reading(encoded, pictures)

    def pixels(self, picture: Picture) -> Tensor:
        """Return [3, H, W], or tiles [K, 3, H, W]; see `LlavaMedProcessor.picture`.

        Raises:
            DataError: the picture cannot be decoded.
        """
        return self.processor.picture(picture.decode(self.processor.dicom))

    def _check_length(self, encoded: Encoded, limit: int) -> None:
        if len(encoded.input_ids) > limit:
            raise DataError(
                f"the prompt is {len(encoded.input_ids)} tokens long, but at most {limit} fit the model and leave "
                "room for an answer; shorten the conversation or show fewer images"
            )

    def _picture(self, image: ImageRef) -> Picture:
        picture = self._identified(image)
        if not self.processor.has_variable_images:
            return picture
        decoded = picture.decode(self.processor.dicom)  # kept: the number of tokens depends on its size
        return replace(picture, content=decoded, size=decoded.size)

    def _identified(self, image: ImageRef) -> Picture:
        fingerprint = self.processor.image_fingerprint
        if isinstance(image, Image.Image):
            # Two pictures with equal pixels are one; headers keep them apart from files.
            header = f"{image.mode} {image.size}\n".encode()
            palette = bytes(image.getpalette() or ()) if image.mode == "P" else b""
            return Picture(image_key(header + palette + image.tobytes(), fingerprint), image)
        content = image if isinstance(image, bytes) else read_bytes(image, None)
        return Picture(image_key(content, fingerprint), content)


def sizes_of(pictures: Sequence[Picture]) -> list[Size] | None:
    """Width and height of pictures, where they are known."""
    sizes = [picture.size for picture in pictures if picture.size is not None]
    return sizes if len(sizes) == len(pictures) else None


def image_group(images: Sequence[ImageRef]) -> Hashable:
    """Equal for prompts that surely show the same images; found without opening a file."""
    return tuple(_name(image) for image in images)


def _name(image: ImageRef) -> Hashable:
    if isinstance(image, str | Path):
        return str(image)
    return hashlib.sha256(image).digest() if isinstance(image, bytes) else id(image)
