"""Small tokenizers of every kind, and processors with them, without downloads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from llava.constants import IMAGE_TOKEN
from llava.data.encode import place_images, tokenize_segments
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Turn

MARK = "\N{LOWER ONE EIGHTH BLOCK}"


def llama_like(*, added: Sequence[str] = (IMAGE_TOKEN,)) -> PreTrainedTokenizerFast:
    """Return a sentencepiece-style tokenizer with byte fallback and Llama's two spellings of `###`."""
    # `###` is one token after a prefix mark and two after a line end.
    merges = [("#", "#"), (MARK, "##"), (MARK + "##", "#"), (MARK, "a"), ("e", "s"), ("A", "S"), ("AS", "S")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [MARK, *(chr(code) for code in range(33, 127)), *("".join(pair) for pair in merges)]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def byte_level(*, added: Sequence[str] = (IMAGE_TOKEN,)) -> PreTrainedTokenizerFast:
    """Return byte-level BPE without a start token, with ChatML marks, as of SmolLM2 or GPT-NeoX."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", "a"), ("e", "s"), ("#", "#"), ("##", "#")]
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", *added], special_tokens=True)
    return tokenizer


KINDS: dict[str, Any] = {
    "sentencepiece, mark per chunk": lambda: (llama_like(), "chunk"),
    "sentencepiece, mark per text": lambda: (llama_like(), "text"),
    "byte level": lambda: (byte_level(), None),
}


def write_processor(path: Path, template: str = "v1") -> Path:
    """Write a folder with a processor for text and images, as in a model folder."""
    clip = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaMedProcessor(llama_like(), clip, template=template, num_image_tokens=4).save_pretrained(path)
    return path


def make_processor(kind: str = "sentencepiece, mark per chunk", **settings: Any) -> LlavaMedProcessor:
    """Return a text processor with one of the tokenizers; default: three tokens per image."""
    tokenizer, mark = KINDS[kind]()
    return LlavaMedProcessor(
        tokenizer, None, **{"template": "vicuna_v1", "num_image_tokens": 3, "prefix_mark": mark, **settings}
    )


def talk(*texts: str, system: str | None = None) -> Conversation:
    """Return a conversation of alternating questions and answers."""
    return Conversation(tuple(Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)), system)


def trained_text(conversation: Conversation, processor: LlavaMedProcessor) -> str:
    """Return the characters from each trained token to the start of the next token, joined."""
    segments = processor.template.render(place_images(conversation, processor))
    text = "".join(segment.text for segment in segments)
    draft = tokenize_segments(segments, processor)
    starts = [start for start, _ in draft.characters] + [len(text)]
    return "".join(text[starts[t] : starts[t + 1]] for t, trained in enumerate(draft.trained) if trained)
