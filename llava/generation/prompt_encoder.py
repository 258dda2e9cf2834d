"""Encoding of prompts as model inputs: tokens, and the pixels of images identified by their content.

Prompt --PromptReader--> Encoded + image keys --PromptReader.pixels--> [3, H, W] of each key, decoded once a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from PIL import Image
from torch import Tensor

from llava.data.encode import Encoded, encode, encode_prompt, encode_rendered
from llava.errors import DataError, NotUnicodeError, PromptTooLongError
from llava.generation.held import encode_held
from llava.generation.pixel_cache import Pixels
from llava.generation.protocol import ImageRef, Prompt
from llava.imaging.anyres import Size
from llava.imaging.decode import DecodedImage, image_key, read_image_bytes
from llava.processing import LlavaMedProcessor

KnownPixels: TypeAlias = Callable[[str, Callable[[], Pixels]], Pixels]

CHARACTERS_PER_TOKEN = 16
"""Characters per context token above which a submitted prompt is refused without tokenizing it."""


@dataclass(frozen=True, slots=True)
class PromptImage:
    """Image of a prompt.

    Attributes:
        key: identity as model input; images with equal keys are computed once.
        content: bytes of a file, or a decoded image.
        size: width and height where the number of tokens depends on them.
    """

    key: str
    content: bytes | Image.Image
    size: Size | None = None

    def decode(self, processor: LlavaMedProcessor) -> Image.Image | DecodedImage:
        """Return the image as the processor reads files.

        Raises:
            DataError: the bytes are not an image.
        """
        return processor.open(self.content) if isinstance(self.content, bytes) else self.content


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Tokens of a prompt and the images that they refer to."""

    encoded: Encoded
    images: tuple[PromptImage, ...]


class PromptReader:
    """Encoder of prompts for one model."""

    def __init__(self, processor: LlavaMedProcessor, *, max_tokens: int, longest: int | None = None) -> None:
        """Use the processor's template and preprocessing; refuse prompts of `max_tokens` or more tokens.

        Args:
            processor: processor of the model.
            max_tokens: largest number of tokens of a prompt with its answer.
            longest: length to which a prompt with images is cut, as an original does (`--compat cut_prompt`).
        """
        self.processor = processor
        self.max_tokens = max_tokens
        self.longest = longest

    def read(self, prompt: Prompt) -> EncodedPrompt:
        """Return tokens and images of a prompt, ready for the answer.

        Raises:
            DataError: an image is missing, placeholders and images differ in number, or the prompt is too long.
        """
        return self._read(prompt, [self._image(image) for image in prompt.images])

    def read_whole(
        self, prompt: Prompt, *, ends: Collection[int] = (), known: KnownPixels | None = None
    ) -> tuple[EncodedPrompt, dict[str, Tensor]]:
        """Return what `read` does, and the pixels of each image by key; the images themselves are not kept.

        Images are decoded one after another, so that no two of them are in memory at a time.

        Args:
            prompt: the prompt.
            ends: ids of tokens that end answers, for a prompt with a history.
            known: returns the pixels of an image key, from earlier or made by its second argument.

        Raises:
            DataError: as `read`, or an image cannot be decoded.
        """
        limit = CHARACTERS_PER_TOKEN * self.max_tokens
        num_characters = sum(map(len, named_texts(prompt).values()))
        if num_characters > limit:
            raise PromptTooLongError(
                f"the prompt has {num_characters} characters, but at most {limit} are read for a context of "
                f"{self.max_tokens} tokens; shorten the conversation"
            )
        identified = [self._identified(reference) for reference in prompt.images]
        images = [replace(image, content=b"") for image in identified]
        # A prompt that is too long is refused before its images are decoded, unless their sizes decide its length.
        reading = None if self.processor.has_variable_images else self._read(prompt, images, ends)
        made: dict[str, Pixels] = {}
        for image in identified:
            if image.key not in made:
                make = partial(self._made, image)
                made[image.key] = make() if known is None else known(image.key, make)
        if reading is None:
            reading = self._read(prompt, [replace(image, size=made[image.key].size) for image in images], ends)
        return reading, {key: pixels.tensor for key, pixels in made.items()}

    def _made(self, image: PromptImage) -> Pixels:
        """Return pixels and size of an image.

        The image is a local here: a caller's variable would keep it during the next one.
        """
        decoded = image.decode(self.processor)
        return Pixels(self.processor.preprocess(decoded), _content(decoded).size)

    def _read(self, prompt: Prompt, images: Sequence[PromptImage], ends: Collection[int] = ()) -> EncodedPrompt:
        check_unicode(prompt)
        keys = [image.key for image in images]
        sizes = sizes_of(images)
        if prompt.history is not None and prompt.history.answers:
            encoded = encode_held(prompt, self.processor, images=keys, sizes=sizes, ends=ends)
        elif prompt.rendered is None:
            encoded = encode_prompt(prompt.conversation, self.processor, images=keys, sizes=sizes)
        else:
            encoded = encode_rendered(prompt.rendered, self.processor, images=keys, sizes=sizes)
        encoded = cut_prompt(encoded, self.longest)
        self._check_length(encoded, self.max_tokens - 1)
        return EncodedPrompt(encoded, tuple(images[: len(encoded.images)]))

    def encode_answered(self, prompt: Prompt) -> EncodedPrompt:
        """Return tokens, labels and images of a conversation that holds its answers.

        Raises:
            DataError: as `read`.
        """
        images = tuple(self._image(image) for image in prompt.images)
        keys = [image.key for image in images]
        sizes = sizes_of(images)
        # An answer without text is scored by its end mark, although training leaves it out.
        turns = tuple(
            replace(turn, train=True) if turn.role == "gpt" and turn.train is None else turn
            for turn in prompt.conversation.turns
        )
        conversation = replace(prompt.conversation, turns=turns)
        encoded = encode(conversation, self.processor, images=keys, sizes=sizes, max_length=None)
        self._check_length(encoded, self.max_tokens)
        return EncodedPrompt(encoded, images)

    def pixels(self, image: PromptImage) -> Tensor:
        """Return [3, H, W], or tiles [K, 3, H, W]; see `LlavaMedProcessor.preprocess`.

        Raises:
            DataError: the image cannot be decoded.
        """
        return self.processor.preprocess(image.decode(self.processor))

    def _check_length(self, encoded: Encoded, limit: int) -> None:
        if len(encoded.input_ids) > limit:
            raise PromptTooLongError(
                f"the prompt is {len(encoded.input_ids)} tokens long, but at most {limit} fit the model and leave "
                "room for an answer; shorten the conversation or pass fewer images"
            )

    def _image(self, reference: ImageRef) -> PromptImage:
        image = self._identified(reference)
        if not self.processor.has_variable_images:
            return image
        decoded = image.decode(self.processor)  # kept, because the number of tokens depends on its size
        content = _content(decoded)
        return replace(image, content=content, size=content.size)

    def _identified(self, image: ImageRef) -> PromptImage:
        fingerprint = self.processor.image_fingerprint
        if isinstance(image, Image.Image):
            # Images with equal pixels are one; the header separates them from files.
            header = f"{image.mode} {image.size}\n".encode()
            palette = bytes(image.getpalette() or ()) if image.mode == "P" else b""
            return PromptImage(image_key(header + palette + image.tobytes(), fingerprint), image)
        content = image if isinstance(image, bytes) else read_image_bytes(image, None)
        return PromptImage(image_key(content, fingerprint), content)


def _content(decoded: Image.Image | DecodedImage) -> Image.Image:
    return decoded.image if isinstance(decoded, DecodedImage) else decoded


def check_unicode(prompt: Prompt) -> None:
    """Refuse text that is not Unicode, which tokenizers do not accept.

    Raises:
        NotUnicodeError: names the turn and the character.
    """
    for name, text in named_texts(prompt).items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise NotUnicodeError(
                f"{name} is not Unicode: character {error.start} is half of a surrogate pair; remove it"
            ) from None


def named_texts(prompt: Prompt) -> dict[str, str]:
    """Return the texts of a prompt with names for messages."""
    turns = {f"turn {index}": turn.text for index, turn in enumerate(prompt.conversation.turns)}
    system, rendered = prompt.conversation.system or "", prompt.rendered or ""
    return {"the system text": system, **turns, "the prompt": rendered}


def cut_prompt(encoded: Encoded, length: int | None) -> Encoded:
    """Return the first tokens of a prompt with images; one without images stays whole, as in the original.

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


def sizes_of(images: Sequence[PromptImage]) -> list[Size] | None:
    """Return width and height of the images; None where they are unknown."""
    sizes = [image.size for image in images if image.size is not None]
    return sizes if len(sizes) == len(images) else None


def image_group(images: Sequence[ImageRef]) -> Hashable:
    """Return a key that is equal for prompts with the same image references; opens no file."""
    return tuple(_name(image) for image in images)


def _name(image: ImageRef) -> Hashable:
    if isinstance(image, str | Path):
        return str(image)
    return hashlib.sha256(image).digest() if isinstance(image, bytes) else id(image)
