"""Processor of a model: tokenizer, image preprocessing and template, saved with the weights.

image --preprocess--> [3, H, W] or tiles [K, 3, H, W]    text --data.encode--> ids (one placeholder id per image token)
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.constants import IM_END_TOKEN, IM_PATCH_TOKEN, IM_START_TOKEN, IMAGE_TOKEN, PROCESSOR_FILE
from llava.errors import WRONG_SETTINGS, CheckpointError, ConfigError
from llava.imaging.anyres import ANYRES, KEEP, VARIABLE_MODES, ImageGrid, Size, parse_pinpoints
from llava.imaging.decode import DECODE_VERSION, DecodedImage, decode_image
from llava.imaging.dicom.policy import DicomPolicy
from llava.imaging.geometry import IMAGE_MODES, anyres_tiles, fit_image, mean_color, to_rgb
from llava.imaging.image_processor import (
    IMAGE_PROCESSOR_FILE,
    FastPreprocessor,
    check_resized,
    fit_decoded,
    load_image_processor,
    output_size,
)
from llava.imaging.jpeg import JPEG_SCALE_VERSION, choose_scale
from llava.jinja_template import JinjaTemplate, Template, find_template
from llava.tokenization import PrefixMark, TextTokenizer, read_tokenizer, token_id
from llava.utils.faults import start_of
from llava.utils.jsonl import write_json
from llava.utils.lookup import lookup
from llava.utils.plugins import check_plugin_record, plugin_record

Placement = Literal["front", "as_written"]
PLACEMENTS: dict[str, Placement] = {"front": "front", "as_written": "as_written"}
"""`front` moves the images of a turn before its text (LLaVA since 1.0); `as_written` keeps them (LLaVA-Med 1.0)."""


class LlavaMedProcessor:
    """Tokenizer, image processor, template, and the settings that training and inference share.

    Args:
        tokenizer: a fast tokenizer with the token `<image>` (or `<im_patch>`).
        image_processor: a PIL image processor of transformers; None for text only.
        template: key of `TEMPLATES` or `FAMILIES`, or `auto` for the chat template of the tokenizer.
        image_mode: key of `imaging.geometry.MODES`, how images are shaped for the vision tower.
        num_image_tokens: number of tokens of one image, or of one tile.
        placement: key of `PLACEMENTS`.
        use_im_start_end: write `<im_start>` and `<im_end>` around each image.
        system: replaces the template's system text.
        strip_around_images: remove white space around images, as the tokenizer of LLaVA-Med 1.0 did.
        prefix_mark: see `tokenization`; None to read it from the files of the tokenizer.
        add_bos: whether a text starts with the begin-of-text token; None to read it from the files of the tokenizer.
        dicom: rendering of DICOM files, see `DicomPolicy.settings`; None for the default.
        patch_merge_type: how the tiles of image mode `anyres` are joined, see `imaging.anyres.MERGE_TYPES`.
        image_grid_pinpoints: image sizes that `anyres` chooses from; None for those of LLaVA 1.6.
        fast_jpeg: whether large JPEG files are decoded at a smaller scale, see `imaging.jpeg`.
        random_padding: shift padded images by zero or one pixel at random, as LLaVA-Med 1.5 does; never saved.
        trains_empty: train answers without text, see `ConversationTemplate`; never saved.

    Settings are not changed after construction; `changed` returns a processor with others:
    >>> processor.changed(placement="as_written").placement
    'as_written'

    Raises:
        ConfigError: a name is unknown, settings contradict each other, or the tokenizer has no image placeholder.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        *,
        template: str,
        image_mode: str = "square",
        num_image_tokens: int,
        placement: str = "front",
        use_im_start_end: bool = False,
        system: str | None = None,
        strip_around_images: bool = False,
        prefix_mark: PrefixMark | None = None,
        add_bos: bool | None = None,
        dicom: Mapping[str, Any] | None = None,
        patch_merge_type: str = "flat",
        image_grid_pinpoints: Any = None,
        fast_jpeg: bool = False,
        random_padding: bool = False,
        trains_empty: bool = False,
    ) -> None:
        if num_image_tokens < 1:
            raise ConfigError(f"num_image_tokens is {num_image_tokens}; expected at least 1")
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.num_image_tokens = num_image_tokens
        self._set_image_mode(image_mode, patch_merge_type, image_grid_pinpoints)
        self.dicom, self.random_padding = DicomPolicy.of(dicom), random_padding
        self.fast_jpeg = _switch("fast_jpeg", fast_jpeg)
        self.placement = lookup(PLACEMENTS, placement, "image placement")
        self.use_im_start_end = use_im_start_end
        self.strip_around_images = strip_around_images
        self._published_text = TextTokenizer(tokenizer, prefix_mark, add_bos=add_bos)
        self.trains_empty = trains_empty
        self._set_template(template, system)
        self.image_token_id = _find_image_token(tokenizer)
        markers = (token_id(tokenizer, IM_START_TOKEN), token_id(tokenizer, IM_END_TOKEN))
        self.marker_ids: tuple[int | None, int | None] = markers

    def changed(
        self,
        *,
        template: str | None = None,
        chat_template: str | None = None,
        system: str | None = None,
        image_mode: str | None = None,
        patch_merge_type: str | None = None,
        image_grid_pinpoints: Any = None,
        placement: str | None = None,
        strip_around_images: bool | None = None,
        dicom: DicomPolicy | None = None,
        fast_jpeg: bool | None = None,
        random_padding: bool | None = None,
        trains_empty: bool | None = None,
    ) -> LlavaMedProcessor:
        """Return a processor with other settings; tokenizer and image processor are shared.

        Args:
            template: as for the class, with its default system prompt unless `system` is given. The name of the current
                template changes nothing, and keeps the system prompt of a checkpoint.
            chat_template: text of a chat template, for `auto`; the returned processor has a tokenizer of its own.
            dicom: rendering of DICOM files.

        The others are those of the class; None keeps the current setting.

        Raises:
            ConfigError: a setting is unknown, or contradicts others.
        """
        made = copy.copy(self)
        made.__dict__.pop("image_fingerprint", None)  # depends on the settings
        made.trains_empty = self.trains_empty if trains_empty is None else trains_empty
        made.template = replace(self.template, trains_empty=made.trains_empty)
        if chat_template is not None:
            made.tokenizer = copy.deepcopy(self.tokenizer)
            made.tokenizer.chat_template = chat_template
        if template is not None or system is not None:
            name = self.template.name if template is None else template
            keeps = system is None and name == self.template.name
            made._set_template(name, self.system if keeps else system)
        if (image_mode, patch_merge_type, image_grid_pinpoints) != (None, None, None):
            grid = self.image_grid
            made._set_image_mode(
                image_mode or self.image_mode, patch_merge_type or grid.merge, image_grid_pinpoints or grid.pinpoints
            )
        made.placement = self.placement if placement is None else lookup(PLACEMENTS, placement, "image placement")
        made.strip_around_images = self.strip_around_images if strip_around_images is None else strip_around_images
        made.dicom = self.dicom if dicom is None else dicom
        made.fast_jpeg = self.fast_jpeg if fast_jpeg is None else _switch("fast_jpeg", fast_jpeg)
        made.random_padding = self.random_padding if random_padding is None else random_padding
        return made

    def _set_template(self, name: str, system: str | None) -> None:
        template: Any = replace(find_template(self.tokenizer, name), trains_empty=self.trains_empty)
        self.system = system
        self.template: Template = template if system is None else template.with_system(system)
        # A chat template writes its begin-of-text token itself, and is tokenized as transformers does.
        is_chat = isinstance(self.template, JinjaTemplate)
        self.text = TextTokenizer(self.tokenizer, "backend", add_bos=False) if is_chat else self._published_text

    def _set_image_mode(self, mode: str, merge: str, pinpoints: Any) -> None:
        if mode not in IMAGE_MODES:
            raise ConfigError(f"unknown image mode {mode!r}; known: {', '.join(IMAGE_MODES)}")
        self.image_mode = mode
        self.image_grid: ImageGrid = self._grid(mode, merge, pinpoints)

    def _grid(self, mode: str, merge: str, pinpoints: Any) -> ImageGrid:
        if mode not in VARIABLE_MODES:
            return ImageGrid(mode, 0, self.num_image_tokens, merge, tuple((w, h) for w, h in pinpoints or ()))
        if self.image_processor is None:
            raise ConfigError(f"image mode {mode} needs a vision tower, but this processor is for text only")
        height, width = self.image_size
        if height != width:
            raise ConfigError(f"image mode {mode} needs a vision tower with square input, not {width} x {height}")
        found = parse_pinpoints(pinpoints, height) if mode == ANYRES else ()
        return ImageGrid(mode, height, self.num_image_tokens, merge, found)

    @property
    def has_variable_images(self) -> bool:
        """Whether the number of tokens of an image depends on its size."""
        return self.image_mode in VARIABLE_MODES

    def count_image_tokens(self, num_images: int, sizes: Sequence[Size] | None = None) -> list[int]:
        """Return the number of tokens of each image.

        Args:
            num_images: number of images.
            sizes: width and height of each; required if `has_variable_images`.

        Raises:
            ConfigError: sizes are required but not given for each image.
            DataError: an image has a shape that the image mode does not support.
        """
        if not self.has_variable_images:
            return [self.num_image_tokens] * num_images
        if sizes is None or len(sizes) != num_images:
            raise ConfigError(
                f"image mode {self.image_mode} needs the width and height of each of the {num_images} images, got "
                f"{0 if sizes is None else len(sizes)}"
            )
        return [self.image_grid.count(size) for size in sizes]

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-text token; None if the tokenizer has none."""
        return cast("int | None", self.tokenizer.eos_token_id)

    @property
    def pad_token_id(self) -> int:
        """Id for padding positions; they are always masked, so any token of the vocabulary works."""
        for name in ("pad_token_id", "unk_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                return int(token)
        return 0

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: end of text, and stop strings of the template that are one special token."""
        ids = [] if self.eos_token_id is None else [self.eos_token_id]
        special = {str(token): token_id for token_id, token in self.tokenizer.added_tokens_decoder.items()}
        ids += [special[stop] for stop in self.template.stops if stop in special]
        return tuple(dict.fromkeys(ids))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input of the vision tower in pixels."""
        return output_size(self.image_processor)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Return images as vision tower input, float32 `[N, 3, H, W]`; see `preprocess` for variable sizes.

        Raises:
            ConfigError: the processor is for text only, or the image mode gives inputs of several sizes.
        """
        if self.image_processor is None:
            raise ConfigError("this processor is for text only; load one with a vision tower")
        if self.has_variable_images:
            raise ConfigError(f"image mode {self.image_mode} gives inputs of several sizes; call `preprocess`")
        if not images:
            return torch.zeros(0, 3, *self.image_size)
        return torch.stack([self.preprocess(image) for image in images])

    def open(self, ref: str | Path | bytes, root: str | Path | None = None) -> DecodedImage:
        """Return image `ref` (a name in folder `root`, or the bytes of a file), decoded for `preprocess`.

        Raises:
            DataError: the file is missing, outside `root`, too large, damaged or truncated; the message names it.
            MissingDependency: the decoder of a compressed DICOM file is not installed.
        """
        return decode_image(ref, root, dicom=self.dicom, scale_of=self._scale_of if self.fast_jpeg else None)

    def preprocess(self, image: Image.Image | DecodedImage) -> Tensor:
        """Return an image as vision tower input, float32 `[3, H, W]`, or tiles `[K, 3, H, W]` with `anyres`.

        Raises:
            ConfigError: the processor is for text only.
            DataError: the image has a shape that the image mode does not support.
        """
        if self.image_processor is None:
            raise ConfigError("this processor is for text only; load one with a vision tower")
        if not self.has_variable_images and self._path is not None:
            return self._fast_pixels(image, self._path)
        image = image.image if isinstance(image, DecodedImage) else image
        if not self.has_variable_images:
            fitted = self._fit(image)
            check_resized(self.image_processor, fitted.size)
            return self._processed([fitted])[0]
        self.image_grid.count(image.size)  # raises for unsupported shapes
        if self.image_mode == KEEP:
            return self._processed([self._fit(image)], do_resize=False, do_center_crop=False)[0]
        columns, rows, side = *self.image_grid.shape(image.size), self.image_grid.tile
        return self._processed(anyres_tiles(image, (columns * side, rows * side), side))

    picture = preprocess  # earlier name

    def _fast_pixels(self, image: Image.Image | DecodedImage, path: FastPreprocessor) -> Tensor:
        """Return [3, H, W] float32 without the image processor."""
        # Bitwise equal to the image processor, unless a JPEG image was decoded at a smaller scale.
        if not isinstance(image, DecodedImage):
            image = DecodedImage(image if image.mode == "L" else to_rgb(image), image.size)
        fitted, size, box = fit_decoded(image, self.image_mode, size=self.image_size, **self._border(), path=path)
        return path.pixels(fitted, size=size, box=box)

    def _fit(self, image: Image.Image) -> Image.Image:
        return fit_image(image, self.image_mode, size=self.image_size, **self._border())

    def _border(self) -> dict[str, Any]:
        """Return the border color of mode `pad`, and the shift of the image from the center in pixels."""
        fill = mean_color(getattr(self.image_processor, "image_mean", None) or (0.5, 0.5, 0.5))
        return {"fill": fill, "shift": random.randint(0, 1) if self.random_padding else 0}

    def _scale_of(self, size: Size) -> int:
        """Return the divisor of the scale at which a JPEG image of this width and height is decoded."""
        if self.has_variable_images or self._path is None:
            return 1
        if self.image_mode == "resize":
            height, width = self.image_size
            return choose_scale(size, (width, height))
        whole = (max(size),) * 2 if self.image_mode == "pad" else size
        return choose_scale(whole, self._path.size_after(whole))

    @cached_property
    def _path(self) -> FastPreprocessor | None:
        return None if self.image_processor is None else FastPreprocessor.of(self.image_processor)

    def _processed(self, images: list[Image.Image], **settings: bool) -> Tensor:
        return cast(Tensor, self.image_processor(images=images, return_tensors="pt", **settings)["pixel_values"])

    @cached_property
    def image_fingerprint(self) -> str:
        """Hash of all image settings: equal fingerprints and equal file bytes give equal pixels."""
        constants = None if self.image_processor is None else self.image_processor.to_dict()
        parts = [DECODE_VERSION, self.image_mode, type(self.image_processor).__name__, constants, self.dicom.settings()]
        parts += [self.image_grid.pinpoints] if self.has_variable_images else []
        parts += [f"JPEG scaled, version {JPEG_SCALE_VERSION}"] if self.fast_jpeg else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids without special tokens."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def save_pretrained(self, path: str | Path) -> None:
        """Save settings, tokenizer and image processor into `path`; each file is replaced atomically."""
        target = Path(path)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".processor-") as folder:
            self.tokenizer.save_pretrained(folder)
            if self.image_processor is not None:
                self.image_processor.save_pretrained(folder)
            settings = {
                "template": self.template.name,
                "system": self.system,
                "image_mode": self.image_mode,
                "num_image_tokens": self.num_image_tokens,
                "placement": self.placement,
                "use_im_start_end": self.use_im_start_end,
                "strip_around_images": self.strip_around_images,
                "prefix_mark": self._published_text.prefix_mark,
                "add_bos": bool(self._published_text.bos_ids),
                "dicom": self.dicom.settings(),
                "patch_merge_type": self.image_grid.merge,
                "image_grid_pinpoints": [list(size) for size in self.image_grid.pinpoints] or None,
                "fast_jpeg": self.fast_jpeg,
                **plugin_record(template=self.template.name),
            }
            write_json(Path(folder) / PROCESSOR_FILE, settings)
            # Settings last: a folder with settings is then complete.
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == PROCESSOR_FILE):
                os.replace(file, target / file.name)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> LlavaMedProcessor:
        """Load a processor that `save_pretrained` saved.

        Raises:
            CheckpointError: the folder has no processor, or it cannot be loaded.
        """
        file = Path(path) / PROCESSOR_FILE
        if not file.is_file():
            raise CheckpointError(f"{path} has no {PROCESSOR_FILE}; expected a llava checkpoint")
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            check_plugin_record(settings, subject=f"{path}: its template")
            tokenizer = read_tokenizer(path)
            image_processor = load_image_processor(path) if (Path(path) / IMAGE_PROCESSOR_FILE).is_file() else None
            return cls(tokenizer, image_processor, **settings)
        except (OSError, *WRONG_SETTINGS) as error:
            raise CheckpointError(f"the processor in {path} cannot be loaded: {start_of(error)}") from error


def _find_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (IMAGE_TOKEN, IM_PATCH_TOKEN):
        if (found := token_id(tokenizer, token)) is not None:
            return found
    raise ConfigError(f"the tokenizer has neither {IMAGE_TOKEN} nor {IM_PATCH_TOKEN}; add one as a special token")


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected true or false")
    return value
