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

from llava.data.encode import Encoded, encode, encode_prompt
from llava.errors import DataError
from llava.generation.protocol import ImageRef, Prompt
from llava.imaging.anyres import Size
from llava.imaging.decode import Opened, image_key, read_bytes
from llava.processing import LlavaMedProcessor


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a prompt: its identity as model input, what it is decoded from, its size where that decides."""

    key: str
    content: bytes | Image.Image
    size: Size | None = None

    def decode(self, processor: LlavaMedProcessor) -> Image.Image | Opened:
        """The picture, read as the processor reads files.

        Raises:
            DataError: the bytes are no picture.
        """
        return processor.open(self.content) if isinstance(self.content, bytes) else self.content


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
        self.longest: int | None = None
        """Where a prompt with images is cut, as an original does (`--compat cut_prompt`); None: nowhere."""

    def read(self, prompt: Prompt) -> Reading:
        """Return tokens and pictures of a prompt, opened for the answer.

        Raises:
            DataError: an image is missing, marks and images differ in number, or the prompt is too long.
        """
        pictures = tuple(self._picture(image) for image in prompt.images)
        keys = [picture.key for picture in pictures]
        encoded = encode_prompt(prompt.conversation, self.processor, images=keys, sizes=sizes_of(pictures))
        encoded = cut(encoded, self.longest)
        pictures = pictures[: len(encoded.images)]
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
        return self.processor.picture(picture.decode(self.processor))

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
        decoded = picture.decode(self.processor)  # kept: the number of tokens depends on its size
        image = decoded.image if isinstance(decoded, Opened) else decoded
        return replace(picture, content=image, size=image.size)

    def _identified(self, image: ImageRef) -> Picture:
        fingerprint = self.processor.image_fingerprint
        if isinstance(image, Image.Image):
            # Two pictures with equal pixels are one; headers keep them apart from files.
            header = f"{image.mode} {image.size}\n".encode()
            palette = bytes(image.getpalette() or ()) if image.mode == "P" else b""
            return Picture(image_key(header + palette + image.tobytes(), fingerprint), image)
        content = image if isinstance(image, bytes) else read_bytes(image, None)
        return Picture(image_key(content, fingerprint), content)


def cut(encoded: Encoded, length: int | None) -> Encoded:
    """The first tokens of a prompt with images; one without images stays whole, as in the original.

    Raises:
        DataError: the cut goes through an image.
    """
    if length is None or not encoded.images or len(encoded.input_ids) <= length:
        return encoded
    num_images = sum(stop <= length for _, stop in encoded.image_spans)
    if any(start < length < stop for start, stop in encoded.image_spans):
        raise DataError(f"--compat cut_prompt: the training length of {length} tokens ends inside an image")
    return replace(
        encoded,
        input_ids=encoded.input_ids[:length],
        labels=encoded.labels[:length],
        turns=encoded.turns[:length],
        image_spans=encoded.image_spans[:num_images],
        images=encoded.images[:num_images],
        image_sizes=encoded.image_sizes[:num_images],
        num_cut=len(encoded.input_ids) - length,
    )


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
