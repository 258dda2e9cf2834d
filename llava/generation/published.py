"""Functions of published snippets by name: load a model, tokenize around images, generate from ids.

    prompt --tokenizer_image_token--> ids with -200 per image --PublishedModel.generate(images=)--> these ids + answer

They are thin layers over the loader and the model; nothing depends on the name of a model. `llava/mm_utils.py`,
`llava/model/builder.py` and `llava/utils/data_loaders.py` look them up at first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from llava.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import ConfigError, DataError
from llava.generation.loading import load_for_inference
from llava.imaging.decode import load_image
from llava.imaging.geometry import fit_image, mean_color
from llava.imaging.image_processor import output_size
from llava.processing import LlavaMedProcessor
from llava.tokenization import TextTokenizer

_TEXTS: WeakKeyDictionary[Any, TextTokenizer] = WeakKeyDictionary()
"""Text tokenizers of loaded models by their tokenizer; they hold settings that its files lack."""


class PublishedModel:
    """Model whose `generate` takes ids with one `IMAGE_TOKEN_INDEX` per image; all else is delegated."""

    def __init__(self, model: Any, processor: LlavaMedProcessor) -> None:
        """Wrap a model and its processor."""
        self.model = model
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model."""
        return getattr(self.__dict__["model"], name)

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, images: Any = None, **options: Any) -> Tensor:
        """Return the ids given, followed by the generated ones.

        Args:
            input_ids: `[N, T]`, with `IMAGE_TOKEN_INDEX` for each image.
            images: preprocessed images, `[M, 3, H, W]` or a list, in the order of their ids.
            options: arguments of transformers' `generate`.

        Raises:
            DataError: the numbers of ids and images differ.
        """
        device = self.model.device
        given = input_ids.to(device)
        expanded = self._expanded(given)
        inputs: dict[str, Any] = {"input_ids": expanded, "attention_mask": torch.ones_like(expanded)}
        num_images = int((given == IMAGE_TOKEN_INDEX).sum())
        pixels = None if images is None else torch.stack(list(images)) if isinstance(images, list | tuple) else images
        if num_images != (0 if pixels is None else len(pixels)):
            got = 0 if pixels is None else len(pixels)
            raise DataError(f"{num_images} ids {IMAGE_TOKEN_INDEX} for {got} images; expected one per image")
        if pixels is not None:
            inputs["pixel_values"] = pixels.to(device, self.model.dtype)
        criteria = options.pop("stopping_criteria", None) or []
        shown = [_OnGivenIds(one, given, expanded.shape[1]) for one in criteria]
        # Sampling settings would only cause warnings.
        dropped = () if options.get("do_sample") else ("temperature", "top_p", "top_k")
        options = {name: value for name, value in options.items() if name not in dropped}
        written = self.model.generate(**inputs, stopping_criteria=StoppingCriteriaList(shown), **options)
        return torch.cat([given, written[:, expanded.shape[1] :]], dim=1)

    def _expanded(self, ids: Tensor) -> Tensor:
        """Return ids `[N, T]` with one placeholder for each token of an image."""
        number, token = self.processor.num_image_tokens, self.processor.image_token_id
        rows = [
            torch.cat([one.new_full((number,), token) if one == IMAGE_TOKEN_INDEX else one[None] for one in row])
            for row in ids
        ]
        if len({len(row) for row in rows}) > 1:
            raise DataError("rows of one batch have different numbers of images; generate for each alone")
        return torch.stack(rows)


class _OnGivenIds(StoppingCriteria):
    """Stopping criterion that receives the original ids, with one id per image."""

    def __init__(self, criterion: Callable[..., Any], given: Tensor, num_expanded: int) -> None:
        self.criterion = criterion
        self.given = given
        self.num_expanded = num_expanded

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        copies = self.given.repeat_interleave(len(input_ids) // len(self.given), dim=0)
        return self.criterion(torch.cat([copies, input_ids[:, self.num_expanded :]], dim=1), scores, **options)


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stopping criterion that ends each row whose generated text contains a keyword."""

    def __init__(self, keywords: Sequence[str], tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> None:
        """Look for keywords in what follows `input_ids` `[N, T]`."""
        self.keywords = tuple(keywords)
        self.tokenizer = tokenizer
        self.num_prompt = input_ids.shape[1]

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return `[N]`, true for rows that have ended."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.num_prompt :], skip_special_tokens=False)
        ended = [any(keyword in text for keyword in self.keywords) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def load_pretrained_model(  # noqa: PLR0917 (the published signature)
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str | None = None,
) -> tuple[PreTrainedTokenizerBase, PublishedModel, Any, int]:
    """Return tokenizer, model, image processor and context length of a checkpoint in any known format.

    Args:
        model_path: checkpoint folder or hub name.
        model_base: base of an adapter or projector; None for the one it names.
        model_name: no effect; the files decide.
        load_8bit: quantize to 8 bits.
        load_4bit: quantize to 4 bits.
        device_map: no effect; the model is on one device.
        device: cpu, cuda ...; default: the accelerator if present.
    """
    bits = 4 if load_4bit else 8 if load_8bit else 16
    loaded = load_for_inference(model_path, base=model_base or None, device=device, bits=bits)
    torch.nn.Module.eval(loaded.model)
    tokenizer = loaded.processor.tokenizer
    _TEXTS[tokenizer] = loaded.processor.text
    model = PublishedModel(loaded.model, loaded.processor)
    return tokenizer, model, loaded.processor.image_processor, loaded.context_len


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> Any:
    """Return the ids of a prompt with `image_token_index` for each image.

    With `return_tensors="pt"` they are a tensor `[T]`.

    Raises:
        ConfigError: another type of tensors is asked for.
    """
    if return_tensors not in (None, "pt"):
        raise ConfigError(f"unsupported return_tensors {return_tensors!r}; expected 'pt' or None")
    text = _TEXTS.get(tokenizer) or TextTokenizer(tokenizer)
    ids = list(text.bos_ids)
    for number, part in enumerate(prompt.split(IMAGE_TOKEN)):
        ids += [image_token_index] * (number > 0) + text(part).ids
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


def get_model_name_from_path(model_path: str) -> str:
    """Return the last part of a path, with its parent for `checkpoint-N`; for messages only."""
    parts = [part for part in str(model_path).split("/") if part]
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def open_image_with_retry(image_path: str | Path, max_attempts: int = 10) -> Image.Image:
    """Return an image as RGB.

    A file that cannot be read is retried, as network folders need at times.

    Raises:
        DataError: every attempt failed; the message names the file.
    """
    for _ in range(max_attempts - 1):
        try:
            return load_image(image_path)
        except DataError:
            continue
    return load_image(image_path)


def process_images(images: Sequence[Image.Image], image_processor: Any, model_cfg: Any = None) -> Tensor:
    """Return images as model input `[N, 3, H, W]`; `image_aspect_ratio` of the configuration may be `pad`."""
    mode = getattr(model_cfg, "image_aspect_ratio", None)
    if mode == "pad":
        fill = mean_color(image_processor.image_mean)
        images = [fit_image(image, "pad", size=output_size(image_processor), fill=fill) for image in images]
    return cast(Tensor, image_processor(images=list(images), return_tensors="pt")["pixel_values"])
